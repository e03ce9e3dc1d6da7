"""Documents of a pack never see each other, and a packed document computes what it computes alone."""

import numpy as np
import pytest
import torch

from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.attention import boundaries, packed_attention
from ivl_lightning.models.build import enable_activation_checkpointing
from ivl_lightning.stages.root import InternVLWithLoss
from tests import tiny

TOLERANCE = 2e-5


@pytest.fixture
def documents():
    rng = np.random.default_rng(1)
    return [
        tiny.random_document(rng, 17, tiles=2),
        tiny.random_document(rng, 5, trained=2),
        tiny.random_document(rng, 30, tiles=1, trained=9),
    ]


@pytest.fixture
def root(model):
    return InternVLWithLoss(model, NextTokenLoss())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_document_does_not_see_another_one(root, documents, training, checkpointing):
    """Change document 1; the hidden states of document 2 stay the same bit for bit.

    In the library the mode matters: with its own cache on, evaluation leaks where checkpointed training does not.
    """
    if checkpointing:
        enable_activation_checkpointing(root.internvl)
    root.train(training)
    other = tiny.random_document(np.random.default_rng(7), 17, tiles=2)
    start = len(documents[0].input_ids)
    before = root.hidden_states(tiny.pack(documents))[0, start:]
    after = root.hidden_states(tiny.pack([other, *documents[1:]]))[0, start:]
    assert torch.equal(before, after)


def test_a_later_token_does_not_change_an_earlier_one(root, documents):
    """Causal inside a document: the last token is exchanged, all others stay."""
    root.eval()
    changed = list(documents)
    ids = [*documents[2].input_ids[:-1], 3]
    changed[2] = type(documents[2])(ids, documents[2].labels, documents[2].pixel_values)
    before, after = (root.hidden_states(tiny.pack(packed))[0] for packed in (documents, changed))
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_packed_equals_alone(root, documents):
    """Hidden states of each document in a pack = those of the document alone."""
    root.eval()
    packed = root.hidden_states(tiny.pack(documents))[0]
    alone = torch.cat([root.hidden_states(tiny.pack([document]))[0] for document in documents])
    torch.testing.assert_close(packed, alone, atol=TOLERANCE, rtol=0)


def test_packed_equals_the_library_unpacked(root, documents):
    """Logits of a document = those of transformers' own unpacked forward with sdpa."""
    root.eval()
    for document in documents:
        ours = root.internvl.lm_head(root.hidden_states(tiny.pack([document])))
        root.internvl.set_attn_implementation("sdpa")
        batch = tiny.pack([document])
        pixels = None
        if len(batch.pixel_values):
            mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
            std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
            pixels = (batch.pixel_values / 255.0 - mean) / std
        theirs = root.internvl(input_ids=batch.input_ids, pixel_values=pixels, use_cache=False).logits
        root.internvl.model.language_model.set_attn_implementation("ivl_packed")
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_sliding_window_by_hand():
    """Window 2, scores all 0: each query averages itself and the key before it.

    Values 1, 3, 5 in one document: 1, (1+3)/2 = 2, (3+5)/2 = 4. A second document starts afresh: 10.
    """
    value = torch.tensor([1.0, 3.0, 5.0, 10.0]).view(1, 1, 4, 1)
    zeros = torch.zeros_like(value)
    cu = boundaries(torch.tensor([0, 3, 4], dtype=torch.int32), torch.device("cpu"))
    output, _ = packed_attention(torch.nn.Identity(), zeros, zeros, value, None, sliding_window=2, **cu)
    assert output.flatten().tolist() == [1.0, 2.0, 4.0, 10.0]


def test_refuses_what_would_leak():
    query = torch.zeros(1, 2, 4, 8)
    cu = boundaries(torch.tensor([0, 4], dtype=torch.int32), torch.device("cpu"))
    layer = torch.nn.Identity()
    with pytest.raises(ValueError, match="document boundaries"):
        packed_attention(layer, query, query, query, None)
    with pytest.raises(ValueError, match="cache"):
        packed_attention(layer, query, torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9, 8), None, **cu)
    with pytest.raises(ValueError, match="attention mask"):
        packed_attention(layer, query, query, query, torch.ones(1, 4), **cu)


def test_a_training_forward_without_boundaries_is_an_error(model):
    """Whoever calls the network itself, without boundaries, is told so instead of training on leaking documents."""
    with pytest.raises(ValueError, match="document boundaries"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
