"""A pair computed once equals its two conversations computed apart: log-probabilities, gradients, nothing leaks."""

import dataclasses

import numpy as np
import pytest
import torch

from ivl_lightning.losses.mpo import PreferenceMixture
from ivl_lightning.models.build import enable_activation_checkpointing
from ivl_lightning.stages.mixed_preference import published_mixture
from ivl_lightning.stages.root import InternVLWithLogps
from ivl_lightning.structures import PairScores
from tests import tiny

FAMILIES = {
    "qwen2": {},
    "llama": {"model_type": "llama", "attention_bias": False},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
}


def family(name):
    shapes = tiny.tiny_config().language_model
    return {"language_model": {**shapes, **FAMILIES[name]}}


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return [
        tiny.random_pair(rng, 9, 5, 7, tiles=3),
        tiny.random_pair(rng, 12, 1, 2),
        tiny.random_pair(rng, 1, 6, 3, tiles=1, unlabeled=2),
    ]


def mpo_loss(root, batch, mixture: PreferenceMixture):
    logps = root(batch)
    reference = torch.tensor([[-20.0, -30.0], [-4.0, -9.0], [-15.0, -7.0]])
    tokens = batch.response_tokens
    return logps, mixture(PairScores(*logps.unbind(1), *reference.unbind(1), *tokens.unbind(1))).loss


def gradients(root):
    return {name: parameter.grad.clone() for name, parameter in root.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_equals_two_sequences(tokenizer, pairs, name, checkpointing):
    """log pi(y | x) of both answers and the gradient of an MPO loss, for three pairs in one pack.

    The plain way runs [prompt | chosen] and [prompt | rejected] with tiles of their own; the other one image and one
    prompt. Sums of at most 7 log-probabilities of about -6 each; 1e-5 absolute.
    """
    model = tiny.build_tiny_model(tokenizer, **family(name))
    if checkpointing:
        enable_activation_checkpointing(model)
    root = InternVLWithLogps(model, chunk_rows=4).train()
    results = []
    for shared in (True, False):
        root.zero_grad()
        logps, loss = mpo_loss(root, tiny.pair_batch(pairs, shared_prefix=shared), published_mixture())
        loss.backward()
        results.append((logps.detach(), gradients(root)))
    (logps, grads), (wanted, wanted_grads) = results
    torch.testing.assert_close(logps, wanted, atol=1e-5, rtol=0)
    assert grads.keys() == wanted_grads.keys()
    assert len(grads) == len(list(root.parameters()))
    for parameter, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted_grads[parameter], atol=1e-5, rtol=1e-4, msg=parameter)


def test_equals_a_plain_forward(tokenizer, pairs):
    """One conversation at a time through the library's own attention and logits, log_softmax over the vocabulary."""
    model = tiny.build_tiny_model(tokenizer).eval()
    ours = InternVLWithLogps(model)(tiny.pair_batch(pairs))
    model.set_attn_implementation("sdpa")
    for number, pair in enumerate(pairs):
        answers = ((pair.chosen_ids, pair.chosen_labels), (pair.rejected_ids, pair.rejected_labels))
        for answer, (ids, labels) in enumerate(answers):
            pixels = None if pair.pixel_values is None else tiny_pixels(pair.pixel_values)
            logits = model(
                input_ids=torch.tensor([[*pair.prompt_ids, *ids]]), pixel_values=pixels, use_cache=False
            ).logits[0]
            logps = logits.log_softmax(-1)
            start = len(pair.prompt_ids)
            wanted = sum(logps[start + place - 1, label] for place, label in enumerate(labels) if label >= 0)
            assert float(ours[number, answer]) == pytest.approx(float(wanted), abs=1e-5)


def tiny_pixels(tiles):
    from ivl_lightning.data.tiling import normalize_tiles

    return normalize_tiles(tiles)


@pytest.mark.parametrize("changed", ["chosen", "rejected", "other pair"])
def test_answers_do_not_see_each_other(tokenizer, pairs, changed):
    """Another chosen answer leaves the rejected one's log-probability as it was, bit for bit, and the other way round;
    another pair in the pack leaves both. The changed one's own must move, or this would show nothing.
    """
    root = InternVLWithLogps(tiny.build_tiny_model(tokenizer)).eval()
    before = root(tiny.pair_batch(pairs))
    first = pairs[0]
    if changed == "other pair":
        others = [first, dataclasses.replace(pairs[1], prompt_ids=[5] * len(pairs[1].prompt_ids)), pairs[2]]
        after = root(tiny.pair_batch(others))
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[2], before[2])
        assert not torch.equal(after[1], before[1])
        return
    ids = [7] * len(getattr(first, f"{changed}_ids"))
    other = dataclasses.replace(first, **{f"{changed}_ids": ids, f"{changed}_labels": ids})
    after = root(tiny.pair_batch([other, *pairs[1:]]))
    own, kept = (0, 1) if changed == "chosen" else (1, 0)
    assert after[0, kept] == before[0, kept]
    assert after[0, own] != before[0, own]


def test_positions_continue_behind_the_prompt(pairs):
    """Prompt 12, answers of 1 and 2: positions 0..11, then 12, then 12 and 13; keys 12, 13 and 14."""
    batch = tiny.pair_batch(pairs[1:2])
    assert batch.position_ids[0].tolist() == [*range(12), 12, 12, 13]
    assert batch.cu_queries.tolist() == [0, 12, 13, 15]
    assert batch.cu_keys.tolist() == [0, 12, 25, 39]
    assert batch.key_rows.tolist() == [*range(12), *range(13), *range(12), 13, 14]
    assert batch.loss_rows.tolist() == [11, 11, 13]
    assert batch.loss_responses.tolist() == [0, 1, 1]


def test_an_empty_micro_batch_has_gradients_of_zero(tokenizer):
    """A rank without a pair in the step takes part in everything and adds nothing."""
    root = InternVLWithLogps(tiny.build_tiny_model(tokenizer), always_run_vision=True).train()
    logps = root(tiny.pair_batch([]))
    assert logps.shape == (0, 2)
    logps.sum().backward()
    assert all(not gradient.any() for gradient in gradients(root).values())
    assert gradients(root)
