"""The last block runs its feed-forward half on supervised rows alone, and nothing that is learned changes by it."""

import numpy as np
import pytest
import torch

from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.build import enable_activation_checkpointing
from ivl_lightning.models.last_layer import select_in_last_layer, selects_rows
from ivl_lightning.models.parts import language_layers
from ivl_lightning.stages.root import InternVLWithLogps, InternVLWithLoss
from tests import tiny

FAMILIES = {
    "qwen2": {},
    "llama": {"model_type": "llama", "attention_bias": False},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
}


def build(tokenizer, family="qwen2"):
    shapes = tiny.tiny_config().language_model
    return tiny.build_tiny_model(tokenizer, language_model={**shapes, **FAMILIES[family]})


def gradients(root):
    return {name: parameter.grad.clone() for name, parameter in root.named_parameters() if parameter.grad is not None}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return tiny.pack([tiny.random_document(rng, 9 + 7 * k, tiles=k % 3, trained=2 + k) for k in range(4)])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_loss_and_gradients_stay(tokenizer, batch, family, checkpointing):
    """A row that predicts nothing has a gradient of exactly 0 behind the last attention, so all sums are the same.

    Names of the state dict stay, too. Phi-3 fuses its halves otherwise and keeps its block.
    """
    results = []
    for selecting in (False, True):
        model = build(tokenizer, family)
        names = list(model.state_dict())
        if selecting:
            select_in_last_layer(model)
            assert selects_rows(model) == (family != "phi3")
        if checkpointing:
            enable_activation_checkpointing(model)
        assert list(model.state_dict()) == names
        root = InternVLWithLoss(model, NextTokenLoss()).train()
        loss, _ = root(batch)
        loss.backward()
        results.append((loss.detach(), gradients(root)))
    (wanted, wanted_grads), (loss, grads) = results
    torch.testing.assert_close(loss, wanted, atol=0, rtol=1e-6)
    assert grads.keys() == wanted_grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted_grads[name], atol=2e-6, rtol=1e-5, msg=name)


def test_the_feed_forward_half_sees_supervised_rows_alone(tokenizer, batch):
    """2 + 3 + 4 + 5 = 14 rows of the whole pack; all of them in the block before, and where no rows are asked for."""
    model = build(tokenizer)
    select_in_last_layer(model)
    seen = []
    for layer in language_layers(model):
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    root, length = InternVLWithLoss(model, NextTokenLoss()), batch.input_ids.shape[1]
    root(batch)
    root.hidden_states(batch)
    assert seen == [length, 14, length, length]


def test_pairs_have_the_same_log_probabilities(tokenizer):
    pairs = [tiny.random_pair(np.random.default_rng(0), 9, 5, 7, tiles=3)]
    model = build(tokenizer)
    wanted = InternVLWithLogps(model)(tiny.pair_batch(pairs))
    select_in_last_layer(model)
    torch.testing.assert_close(InternVLWithLogps(model)(tiny.pair_batch(pairs)), wanted, atol=0, rtol=1e-6)


def test_a_pack_without_a_label_has_gradients_of_zero(tokenizer):
    """No row is left for the last block, and every parameter that a labeled pack reaches still gets a gradient."""
    model = build(tokenizer)
    select_in_last_layer(model)
    root = InternVLWithLoss(model, NextTokenLoss(), always_run_vision=True)
    root(tiny.pack([]))[0].backward()
    assert gradients(root).keys() == {name for name, _ in root.named_parameters()}
    assert not any(gradient.any() for gradient in gradients(root).values())
