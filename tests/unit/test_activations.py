"""What a block keeps for backward, by formula and by autograd itself."""

import pytest
import torch
from torch import nn

from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.models.attention import boundaries
from ivl_lightning.models.build import random_model
from ivl_lightning.models.freeze import set_trainable
from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower
from ivl_lightning.planning.activations import attention_half, feed_forward_half, vision_position
from ivl_lightning.planning.layout import Layout
from ivl_lightning.planning.network import plan_network

WIDTH, WIDE, TOWER_WIDTH, POSITIONS, TILES = 64, 208, 96, 65, 5
LENGTHS = (50, 60, 70)
SHARED = 16
"""Bytes per row of means, deviations and the like, which the formulas leave out; at most."""


def model_config(dtype="float32", *, kind="qwen2", keys=2, norm="layer_norm"):
    padding = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} if kind == "phi3" else {}
    return ModelConfig(
        dtype=dtype,
        vision={
            "hidden_size": TOWER_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 352,
            "use_qk_norm": norm == "rms_norm",
            "norm_type": norm,
            "image_size": 64,
            "patch_size": 8,
        },
        language_model={
            "model_type": kind,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": keys,
            "intermediate_size": WIDE,
            "vocab_size": 500,
            **padding,
        },
    )


def layout(dtype, *, autocast=False):
    size = {"float32": 4, "bfloat16": 2}[dtype]
    compute = 2 if autocast else size
    return Layout("single", 1, 1, 1, 1, compute, size, autocast, False, True, False, 0, False)


class Kept:
    """Bytes that autograd keeps, each storage once, but for some tensors."""

    def __init__(self, *left_out):
        self.left_out = {tensor.untyped_storage().data_ptr() for tensor in left_out}
        self.tensors = {}

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self.left_out:
            # Held, so that no other storage takes its place.
            self.tensors[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    def bytes(self, weights):
        """Without casts of weights, which have a weight's shape, or it transposed."""
        shapes = {shape for weight in weights for shape in (tuple(weight.shape), tuple(weight.shape)[::-1])}
        return sum(size for size, tensor in self.tensors.values() if tuple(tensor.shape) not in shapes)


def block_keeps(block, left_out, autocast, *args, **kwargs):
    kept = Kept(*left_out)
    with (
        torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        result = block(*args, **kwargs)
    found = kept.bytes([value for value in block.parameters() if value.ndim == 2])
    del result
    return found


def network_of(config, model, trainable):
    return plan_network(model.config, trainable, dtype=config.dtype)


@pytest.mark.parametrize(
    ("options", "trainable", "autocast"),
    [
        ({}, "llm", False),
        ({"keys": 4}, "llm", False),
        ({"kind": "llama"}, "projector", False),
        ({"kind": "phi3"}, "llm", False),
        ({"dtype": "bfloat16"}, "llm", False),
        ({}, "llm", True),
    ],
)
def test_a_language_block_keeps_what_is_forecast(options, trainable, autocast):
    config = model_config(**options)
    model = random_model(config, 500)
    set_trainable(model, [trainable])
    tokens = sum(LENGTHS)
    hidden = torch.randn(1, tokens, WIDTH, dtype=getattr(torch, config.dtype)).requires_grad_()
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    rotary = model.model.language_model.rotary_emb(hidden, places)
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    found = block_keeps(
        language_layers(model)[0],
        rotary,
        autocast,
        hidden,
        position_embeddings=rotary,
        attention_mask=None,
        position_ids=places,
        **boundaries(ends, torch.device("cpu")),
    )
    network = network_of(config, model, [trainable])
    types = layout(config.dtype, autocast=autocast)
    expected = attention_half(network, types, copies=True) + feed_forward_half(network, types)
    # Under autocast cosines are multiplied in float32 and kept anew.
    assert expected - SHARED <= found / tokens <= expected + SHARED + 128 * autocast


@pytest.mark.parametrize(
    ("options", "autocast"),
    [({}, False), ({"norm": "rms_norm"}, False), ({"dtype": "bfloat16", "norm": "rms_norm"}, False), ({}, True)],
)
def test_a_block_of_the_tower_keeps_what_is_forecast(options, autocast):
    config = model_config(**options)
    model = random_model(config, 500)
    tiles = torch.randn(TILES, POSITIONS, TOWER_WIDTH, dtype=getattr(torch, config.dtype)).requires_grad_()
    found = block_keeps(vision_layers(vision_tower(model))[0], (), autocast, tiles)
    network = network_of(config, model, ["vision"])
    expected = vision_position(network, layout(config.dtype, autocast=autocast))
    assert found / (TILES * POSITIONS) == pytest.approx(expected, abs=2 * SHARED)
