"""The reference forward pass against the original's recorded outputs, and against transformers where there are none.

Names are mapped here by hand, apart from the project's own key map, which this forward pass is the yardstick of.
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from ivl_lightning.conversion import official_language, official_primitives
from ivl_lightning.conversion.official_forward import OfficialOutputs, UnsupportedError, official_forward
from ivl_lightning.conversion.official_rotary import rotate, rotation
from ivl_lightning.conversion.official_vision import pixel_shuffle

CHECKPOINTS = Path(__file__).parents[1] / "fixtures/checkpoints"
TOLERANCE = 1e-5
CLEAR = 0.01
IMAGE_TOKEN = 5


@dataclass(frozen=True)
class Checkpoint:
    """Original tensors and config in memory, with inputs, and what is known to come out."""

    tensors: dict[str, Tensor]
    config: dict
    inputs: dict[str, Tensor]
    reference: dict[str, Tensor]
    image_token_id: int = IMAGE_TOKEN

    def forward(self, **changes) -> OfficialOutputs:
        """Of the sample, with other tensors, settings or inputs."""
        tensors = {**self.tensors, **changes.get("tensors", {})}
        config = merged(self.config, changes.get("config", {}))
        inputs = {**self.inputs, **changes.get("inputs", {})}
        return official_forward(
            tensors.__getitem__,
            config,
            inputs["input_ids"],
            inputs["pixel_values"],
            image_token_id=self.image_token_id,
        )


def merged(config: dict, changes: Mapping) -> dict:
    nested = {key: merged(config[key], value) for key, value in changes.items() if key.endswith("_config")}
    return {**config, **changes, **nested}


@cache
def golden(name: str) -> Checkpoint:
    folder = CHECKPOINTS / name
    arrays = [
        {key: torch.from_numpy(value) for key, value in np.load(folder / f"{kind}.npz").items()}
        for kind in ("inputs", "reference")
    ]
    inputs = {"input_ids": arrays[0].pop("input_ids")[0], **arrays[0]}
    meta = json.loads((folder / "meta.json").read_text())
    return Checkpoint(
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
        inputs,
        arrays[1],
        meta["img_context_token_id"],
    )


@pytest.fixture(params=["qwen2_vit300m", "internlm2_vit300m"])
def checkpoint(request) -> Checkpoint:
    return golden(request.param)


@pytest.fixture
def internlm2() -> Checkpoint:
    return golden("internlm2_vit300m")


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights at which a wrong norm, bias or layer scale is seen: none of them is 1 or 0, as fresh ones are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        fan_in = math.prod(parameter.shape[1:])
        scale = "norm" in name or "lambda" in name
        parameter.data = 1 + 0.3 * values if scale and parameter.ndim == 1 else values / max(fan_in, 9) ** 0.5
    return model.eval()


def difference(left: Tensor | None, right: Tensor) -> float:
    assert left is not None
    assert left.shape == right.shape
    assert left.dtype == torch.float32
    return (left - right).abs().max().item()


# Against the original's recorded outputs.


def test_a_sample_with_images(checkpoint):
    outputs, reference = checkpoint.forward(), checkpoint.reference
    assert difference(outputs.vision_hidden, reference["vit_last_hidden_state"]) <= TOLERANCE
    assert difference(outputs.image_features, reference["vit_features"]) <= TOLERANCE
    assert difference(outputs.logits, reference["logits"][0]) <= TOLERANCE


def test_text_alone(checkpoint):
    """The original lets a blank tile through and drops its features; here there is no tile."""
    outputs = checkpoint.forward(
        inputs={"input_ids": checkpoint.inputs["text_only_input_ids"][0], "pixel_values": None}
    )
    assert outputs.vision_hidden is None
    assert outputs.image_features is None
    assert difference(outputs.logits, checkpoint.reference["text_only_logits"][0]) <= TOLERANCE


@pytest.mark.parametrize("row", [0, 1])
def test_rows_of_a_padded_batch(checkpoint, row):
    """Padding on the right changes nothing before it."""
    real = checkpoint.inputs["batch_attention_mask"][row] == 1
    pixels = checkpoint.inputs["pixel_values"] if row == 0 else None
    outputs = checkpoint.forward(
        inputs={"input_ids": checkpoint.inputs["batch_input_ids"][row][real], "pixel_values": pixels}
    )
    assert difference(outputs.logits, checkpoint.reference["batch_logits"][row][real]) <= TOLERANCE


# Against transformers' classes, names mapped by hand.

VISION_LAYER = {
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "norm1.weight": "layernorm_before.weight",
    "norm2.weight": "layernorm_after.weight",
    "attn.q_norm.weight": "attention.q_norm.weight",
    "attn.k_norm.weight": "attention.k_norm.weight",
    "attn.proj.weight": "attention.projection_layer.weight",
    "attn.proj.bias": "attention.projection_layer.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
VISION_REST = {
    "vision_model.embeddings.class_embedding": "embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "vision_model.embeddings.patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
}
PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def original_vision(native: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    tensors = {original: native[name] for original, name in VISION_REST.items()}
    for layer in range(layers):
        ours, theirs = f"vision_model.encoder.layers.{layer}", f"encoder.layer.{layer}"
        tensors |= {f"{ours}.{original}": native[f"{theirs}.{name}"] for original, name in VISION_LAYER.items()}
        tensors[f"{ours}.attn.qkv.weight"] = torch.cat(
            [native[f"{theirs}.attention.{part}_proj.weight"] for part in ("q", "k", "v")]
        )
    return tensors


@cache
def large() -> tuple[Checkpoint, InternVLForConditionalGeneration]:
    """A tower in the style of the 6B one (RMS norm, q-k norm, no qkv bias) in front of Llama; 2 tiles of 56 pixels."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "norm_type": "rms_norm",
            "use_qk_norm": True,
            "attention_bias": False,
        },
        text_config={"model_type": "llama", **LLAMA},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = randomized(InternVLForConditionalGeneration(config))
    tensors = original_vision(model.model.vision_tower.state_dict(), 2)
    for place, name in PROJECTOR.items():
        part = model.model.multi_modal_projector.get_submodule(name)
        tensors |= {f"mlp1.{place}.weight": part.weight.data, f"mlp1.{place}.bias": part.bias.data}
    tensors |= {f"language_model.model.{key}": value for key, value in model.model.language_model.state_dict().items()}
    tensors["language_model.lm_head.weight"] = model.lm_head.weight.data
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 56,
    }
    original = {
        "vision_config": vision,
        "llm_config": {"architectures": ["LlamaForCausalLM"], **LLAMA},
        "ps_version": "v2",
    }
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(6, 90, (20,), generator=generator)
    image = torch.tensor([IMAGE_TOKEN] * 4)
    inputs = {
        "input_ids": torch.cat([text[:3], image, text[3:7], image, text[7:]]),
        "pixel_values": torch.randn((2, 3, 56, 56), generator=generator),
    }
    return Checkpoint(tensors, original, inputs, {}), model


LLAMA = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "vocab_size": 90,
    "rms_norm_eps": 1e-5,
}


def test_tower_in_the_style_of_6b_and_llama():
    """The vision settings of the 6B are the original class's defaults: none is in this config."""
    checkpoint, model = large()
    outputs = checkpoint.forward()
    with torch.no_grad():
        hidden = model.model.vision_tower(checkpoint.inputs["pixel_values"]).last_hidden_state
        logits = model(
            input_ids=checkpoint.inputs["input_ids"][None], pixel_values=checkpoint.inputs["pixel_values"]
        ).logits
    assert difference(outputs.vision_hidden, hidden) <= TOLERANCE
    assert difference(outputs.logits, logits[0]) <= TOLERANCE


def test_tiles_of_another_size():
    """84 pixels, 6 by 6 patches: the table of 4 by 4 positions is resized bicubically, the class token's stays."""
    checkpoint, model = large()
    pixels = torch.randn((1, 3, 84, 84), generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([7, *[IMAGE_TOKEN] * 9, 8])
    with torch.no_grad():
        expected = model.model.vision_tower(pixels).last_hidden_state
    outputs = checkpoint.forward(inputs={"input_ids": ids, "pixel_values": pixels})
    assert difference(outputs.vision_hidden, expected) <= TOLERANCE


def same_names(model: torch.nn.Module) -> dict[str, Tensor]:
    """Llama, Qwen2 and Phi-3 keep transformers' names below `language_model.`"""
    return {f"language_model.{name}": value for name, value in model.state_dict().items()}


def logits_difference(model: torch.nn.Module, config: dict, length: int) -> float:
    ids = torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    outputs = official_forward(same_names(model).__getitem__, {"llm_config": config}, ids, None, image_token_id=-1)
    return difference(outputs.logits, expected)


@pytest.mark.parametrize(
    ("rope_scaling", "changes"),
    [
        (None, {}),
        (None, {"attention_bias": True}),
        (None, {"num_key_value_heads": 6}),
        (None, {"head_dim": 12}),
        (None, {"hidden_act": "gelu"}),
        (None, {"rope_theta": 300.0}),
        ({"type": "linear", "factor": 4.0}, {}),
        ({"type": "dynamic", "factor": 2.0}, {}),
        # With d = 8 the wavelengths are 6.3, 63, 628 and 6283: kept, blended, divided, divided.
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            {},
        ),
    ],
)
def test_llama(rope_scaling, changes):
    native = {key: value for key, value in (rope_scaling or {}).items() if key != "type"}
    kind = (rope_scaling or {}).get("type", "default")
    theta = changes.get("rope_theta", 10000.0)
    kept = {key: value for key, value in changes.items() if key != "rope_theta"}
    parameters = {"rope_type": kind, "rope_theta": theta, **native}
    model = randomized(
        LlamaForCausalLM(LlamaConfig(**{**LLAMA, **kept}, rope_parameters=parameters, attn_implementation="eager"))
    )
    config = {"architectures": ["LlamaForCausalLM"], **LLAMA, **changes, "rope_scaling": rope_scaling}
    assert logits_difference(model, config, 40) <= TOLERANCE


PHI3 = {**LLAMA, "num_key_value_heads": 6, "pad_token_id": 0, "original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 16.0]}


@pytest.mark.parametrize(
    ("kind", "length", "heads"), [(None, 40, 6), (None, 40, 2), ("su", 32, 6), ("longrope", 20, 6), ("su", 40, 6)]
)
def test_phi3(kind, length, heads):
    """Fused qkv and gate_up; `su` with short factors up to 32 tokens, with long ones beyond.

    cos and sin are times sqrt(1 + ln(256 / 32) / ln(32)) = 1.26 at any length.
    """
    sizes = {**PHI3, "num_key_value_heads": heads}
    scaled = {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **(scaled if kind else {})}
    model = randomized(Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=parameters, attn_implementation="eager")))
    scaling = {"type": kind, **FACTORS} if kind else None
    config = {"architectures": ["Phi3ForCausalLM"], **sizes, "rope_scaling": scaling, "sliding_window": 262144}
    # The class's default for it is the 1e-5 of `sizes`.
    del config["rms_norm_eps"]
    assert logits_difference(model, config, length) <= TOLERANCE


INTERNLM2 = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def original_internlm2(native: Mapping[str, Tensor], key_heads: int) -> dict[str, Tensor]:
    """Each key head's query heads, then it, then its value head: rows of wqkv are (key heads, g + 2, d)."""
    tensors = {}
    for name, value in native.items():
        for theirs, original in INTERNLM2.items():
            name = name.replace(theirs, original)
        tensors[f"language_model.{name}"] = value
    for name in [name for name in tensors if "q_proj" in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in ("q", "k", "v")]
        groups = [part.unflatten(0, (key_heads, -1)) for part in parts]
        tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(groups, dim=1).flatten(0, 1)
    return tensors


def test_internlm2_with_biases():
    """Released ones have none, though the class's default says so; 6 heads of width 10, 3 on each key head."""
    sizes = {**LLAMA, "hidden_size": 60}
    model = randomized(LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, attn_implementation="eager")))
    tensors = original_internlm2(model.state_dict(), 2)
    ids = torch.arange(30)
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    config = {"llm_config": {"architectures": ["InternLM2ForCausalLM"], **sizes}}
    outputs = official_forward(tensors.__getitem__, config, ids, None, image_token_id=-1)
    assert difference(outputs.logits, expected) <= TOLERANCE


# By hand.

GRID = torch.arange(16.0).reshape(1, 16, 1)


def test_pixel_shuffle_by_hand():
    """4 by 4 patches numbered row by row: a token holds its upper two, then its lower two."""
    by_rows = torch.tensor([[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]).float()
    assert torch.equal(pixel_shuffle(GRID, 2, "v2"), by_rows)
    assert torch.equal(pixel_shuffle(GRID, 2, "v1"), by_rows[:, [0, 2, 1, 3]])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(min_value=1, max_value=3),
    st.integers(min_value=1, max_value=4),
    st.integers(min_value=1, max_value=3),
    st.integers(min_value=1, max_value=3),
)
def test_v1_is_v2_with_the_token_grid_transposed(tiles, tokens, factor, channels):
    """v2: y[n, i T + j, (f a + b) C + c] = x[n, (f i + a) G + f j + b, c]; v1: the same at y[n, j T + i]."""
    grid = tokens * factor
    x = torch.arange(float(tiles * grid * grid * channels)).reshape(tiles, grid * grid, channels)
    v1, v2 = pixel_shuffle(x, factor, "v1"), pixel_shuffle(x, factor, "v2")
    assert torch.equal(v1.unflatten(1, (tokens, tokens)).transpose(1, 2).flatten(1, 2), v2)
    for i, j, a, b in np.ndindex(tokens, tokens, factor, factor):
        block = slice((factor * a + b) * channels, (factor * a + b + 1) * channels)
        assert torch.equal(v2[:, i * tokens + j, block], x[:, (factor * i + a) * grid + factor * j + b])


def test_features_of_a_v1_config(checkpoint):
    """The projector sees each token alone, so its rows are transposed too."""
    v1, v2 = (checkpoint.forward(config={"ps_version": version}).image_features for version in ("v1", "v2"))
    assert difference(v1, v2[:, [0, 2, 1, 3]]) <= 1e-6


def test_rotation_by_hand():
    """d = 2 has the one frequency 1: at position p the pair (1, 0) becomes (cos p, sin p)."""
    section = official_primitives.Section(
        "", {"rope_theta": 500.0, "rope_scaling": None}, {"rope_theta": 0, "rope_scaling": 0}
    )
    turns = rotation(section, {}, 3, 2, torch.device("cpu"))
    turned = rotate(torch.tensor([1.0, 0.0]).expand(1, 3, 2), *turns)
    expected = [[math.cos(p), math.sin(p)] for p in range(3)]
    assert torch.allclose(turned[0], torch.tensor(expected), atol=1e-7)


# Settings.


def test_another_select_layer(checkpoint):
    """hidden_states[-2] of 3 layers is the last of 2, entry 0 the embeddings; vision_hidden stays that of the last."""
    outputs = checkpoint.forward(config={"select_layer": -2})
    shorter = checkpoint.forward(config={"vision_config": {"num_hidden_layers": 2}})
    assert torch.equal(outputs.image_features, shorter.image_features)
    assert torch.equal(outputs.vision_hidden, checkpoint.forward().vision_hidden)
    embeddings = checkpoint.forward(config={"vision_config": {"num_hidden_layers": 0}})
    for entry in (0, -4):
        features = checkpoint.forward(config={"select_layer": entry}).image_features
        assert torch.equal(features, embeddings.image_features)


def test_missing_settings_take_the_defaults_of_the_original_classes(checkpoint):
    config = json.loads(json.dumps(checkpoint.config))
    for key in ("select_layer", "downsample_ratio", "use_backbone_lora", "use_llm_lora"):
        del config[key]
    for key in ("patch_size", "hidden_act", "layer_norm_eps"):
        del config["vision_config"][key]
    del config["llm_config"]["hidden_act"]
    ids, pixels = checkpoint.inputs["input_ids"], checkpoint.inputs["pixel_values"]
    outputs = official_forward(
        checkpoint.tensors.__getitem__, config, ids, pixels, image_token_id=checkpoint.image_token_id
    )
    assert torch.equal(outputs.logits, checkpoint.forward().logits)
    del config["ps_version"]
    outputs = official_forward(
        checkpoint.tensors.__getitem__, config, ids, pixels, image_token_id=checkpoint.image_token_id
    )
    assert torch.equal(outputs.logits, checkpoint.forward(config={"ps_version": "v1"}).logits)


SCALING = {"type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v3"}, "ps_version='v3'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio=0.3"),
        ({"downsample_ratio": 1 / 3}, "downsample_ratio=0.333"),
        ({"select_layer": 4}, "select_layer=4"),
        ({"use_backbone_lora": 16}, "use_backbone_lora=16"),
        ({"use_llm_lora": 16}, "use_llm_lora=16"),
        ({"vision_config": {"norm_type": "group_norm"}}, "vision_config.norm_type='group_norm'"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act='relu'"),
        ({"llm_config": {"architectures": ["Gemma2ForCausalLM"]}}, "llm_config.architectures[0]='Gemma2ForCausalLM'"),
        ({"llm_config": {"architectures": None}}, "llm_config.architectures[0]=None"),
        ({"llm_config": {"hidden_act": "relu"}}, "llm_config.hidden_act='relu'"),
        ({"llm_config": {"use_sliding_window": True}}, "llm_config.use_sliding_window=True"),
        ({"llm_config": {"partial_rotary_factor": 0.5}}, "llm_config.partial_rotary_factor=0.5"),
        ({"llm_config": {"rope_parameters": {}}}, "llm_config.rope_parameters={}"),
        ({"llm_config": {"rope_scaling": {"type": "yarn"}}}, "llm_config.rope_scaling={'type': 'yarn'}"),
        ({"llm_config": {"rope_scaling": {**SCALING, "alpha": 1}}}, "llm_config.rope_scaling.alpha=1"),
        (
            {"llm_config": {"rope_scaling": SCALING, "max_position_embeddings": 65}},
            "up to 65 tokens only; there are 66",
        ),
    ],
)
def test_settings_without_a_rule_are_named(change, message):
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        golden("qwen2_vit300m").forward(config=change)


def test_a_window_shorter_than_the_document_is_named():
    """A Phi-3 with a window of 9 tokens sees all of 9, and not all of 10."""
    model = randomized(Phi3ForCausalLM(Phi3Config(**PHI3, sliding_window=9, attn_implementation="eager")))
    config = {"architectures": ["Phi3ForCausalLM"], **PHI3, "sliding_window": 9}
    assert logits_difference(model, config, 9) <= TOLERANCE
    with pytest.raises(UnsupportedError, match=r"llm_config\.sliding_window=9"):
        logits_difference(model, config, 10)


def test_features_and_image_tokens_must_agree(checkpoint):
    """The original takes the first rows and goes on."""
    with pytest.raises(ValueError, match="8 rows of image features meet 12 image tokens"):
        checkpoint.forward(inputs={"pixel_values": checkpoint.inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match="0 rows of image features meet 12 image tokens"):
        checkpoint.forward(inputs={"pixel_values": None})


def test_a_position_table_of_another_size_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"vision_config\.image_size=224 wants 257 positions; .* has 17"):
        checkpoint.forward(config={"vision_config": {"image_size": 224}})


# How tensors are read.


def layer_of(name: str) -> str | None:
    found = re.match(r"(.*layers\.\d+)\.", name)
    return found[1] if found else None


def test_every_tensor_is_read_once_and_layer_by_layer(checkpoint):
    """So one layer's tensors are enough memory, and no tensor of the file goes unseen."""
    names = []

    def read(name: str) -> Tensor:
        names.append(name)
        return checkpoint.tensors[name]

    inputs = checkpoint.inputs
    official_forward(
        read,
        checkpoint.config,
        inputs["input_ids"],
        inputs["pixel_values"],
        image_token_id=checkpoint.image_token_id,
    )
    assert sorted(names) == sorted(checkpoint.tensors)
    runs = [layer for layer, _ in groupby(map(layer_of, names)) if layer]
    assert len(runs) == len(set(runs)) == 6


def test_weights_of_less_precision_are_computed_with_in_float32(checkpoint):
    rounded = {name: value.bfloat16() for name, value in checkpoint.tensors.items()}
    outputs = checkpoint.forward(tensors=rounded)
    expected = checkpoint.forward(tensors={name: value.float() for name, value in rounded.items()})
    assert outputs.logits.dtype == torch.float32
    assert torch.equal(outputs.logits, expected.logits)


def test_the_output_head_in_parts(checkpoint, monkeypatch):
    whole = checkpoint.forward().logits
    monkeypatch.setattr(official_language, "_HEAD_ROWS", 100)
    assert difference(checkpoint.forward().logits, whole) <= TOLERANCE


def test_it_imports_torch_and_its_own_parts_only():
    """A yardstick that shared code with the conversion would share its mistakes."""
    allowed = re.compile(r"torch|__future__|collections|dataclasses|math|typing|ivl_lightning\.conversion\.official_")
    for path in Path(official_language.__file__).parent.glob("official_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert all(allowed.match(module) for module in modules), path


# What a mistake would cost: each moves the outputs clearly.


def test_gate_and_up_swapped_moves_the_logits(internlm2):
    """w2(silu(w1 x) * w3 x) is not w2(silu(w3 x) * w1 x)."""
    swapped = {
        name: internlm2.tensors[name.replace(".w1.", ".w3.") if ".w1." in name else name.replace(".w3.", ".w1.")]
        for name in internlm2.tensors
    }
    assert difference(internlm2.forward(tensors=swapped).logits, internlm2.reference["logits"][0]) > CLEAR


def test_wqkv_as_three_blocks_moves_the_logits(internlm2):
    """6 heads on 2 key heads of width 8: rows are (2, 3 + 1 + 1, 8), not 48 of q, 16 of k, 16 of v."""
    blocks = {}
    for name, value in internlm2.tensors.items():
        if "wqkv" in name:
            groups = value.reshape(2, 5, 8, -1)
            blocks[name] = torch.cat([part.flatten(0, -2) for part in groups.split([3, 1, 1], dim=1)])
    assert len(blocks) == 3
    assert difference(internlm2.forward(tensors=blocks).logits, internlm2.reference["logits"][0]) > CLEAR


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_a_unit_query_or_key_norm_moves_the_features(norm):
    """As when the norm's weight is left out of the key map and stays at 1."""
    checkpoint, _ = large()
    units = {name: torch.ones_like(value) for name, value in checkpoint.tensors.items() if norm in name}
    assert len(units) == 2
    right, wrong = checkpoint.forward(), checkpoint.forward(tensors=units)
    assert difference(wrong.vision_hidden, right.vision_hidden) > CLEAR
    assert difference(wrong.image_features, right.image_features) > CLEAR
    assert difference(wrong.logits, right.logits) > CLEAR


def test_a_wrong_pixel_shuffle_moves_the_features(checkpoint):
    """Tokens transposed, or channel blocks ordered (0,0), (1,0), (0,1), (1,1)."""
    reference = checkpoint.reference
    transposed = checkpoint.forward(config={"ps_version": "v1"})
    assert difference(transposed.image_features, reference["vit_features"]) > CLEAR
    assert difference(transposed.logits, reference["logits"][0]) > CLEAR

    def reordered(value: Tensor) -> Tensor:
        return value.unflatten(-1, (4, 64))[..., [0, 2, 1, 3], :].flatten(-2)

    names = ("mlp1.0.weight", "mlp1.0.bias", "mlp1.1.weight")
    blocks = checkpoint.forward(tensors={name: reordered(checkpoint.tensors[name]) for name in names})
    assert difference(blocks.image_features, reference["vit_features"]) > CLEAR
    assert difference(blocks.logits, reference["logits"][0]) > CLEAR
