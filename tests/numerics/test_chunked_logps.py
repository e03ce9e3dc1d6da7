"""Chunked log-probabilities equal those of full logits, and full logits never exist."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from ivl_lightning.losses.logps import chunked_logps

# Narrower than any chunk but one, so that the transposed head is not taken for logits.
ROWS, WIDTH, WORDS = 7, 2, 11


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets and the weights of a weighted sum."""
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, WIDTH, dtype=dtype), torch.randn(WORDS, WIDTH, dtype=dtype)
    return hidden.requires_grad_(), head.requires_grad_(), torch.randint(0, WORDS, (rows,)), torch.randn(rows)


def full_logps(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return linear(hidden, head).float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


class LargestLogits(TorchDispatchMode):
    """Most rows of any tensor `[rows, WORDS]` that an operation made."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dim() == 2 and made.shape[1] == WORDS:
            self.rows = max(self.rows, made.shape[0])
        return made


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_equals_full_logits(chunk_rows):
    """log softmax(h @ W.T)[target], and the gradients of a weighted sum of it by h and W."""
    hidden, head, targets, weights = inputs()
    wanted = full_logps(hidden, head, targets)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), (hidden, head))
    logps = chunked_logps(hidden, head, targets, chunk_rows)
    grads = torch.autograd.grad((logps * weights).sum(), (hidden, head))
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, wanted, atol=1e-6, rtol=1e-6)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, atol=1e-6, rtol=1e-6)


def test_two_words_by_hand():
    """Logits (0, log 3): probabilities 1/4 and 3/4; d logp_0 / d logits = (1 - 1/4, -3/4)."""
    head = torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)
    logp = chunked_logps(torch.tensor([[1.0]]), head, torch.tensor([0]), 1)
    logp.sum().backward()
    torch.testing.assert_close(logp.exp(), torch.tensor([0.25]))
    torch.testing.assert_close(head.grad, torch.tensor([[0.75], [-0.75]]))


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, head, targets, weights = inputs()
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    (chunked_logps(hidden, head, targets, 3) * weights).sum().backward()
    assert (hidden.grad is None, head.grad is None) == (frozen == "hidden", frozen == "head")


def test_nothing_is_kept_without_gradients():
    hidden, head, targets, _ = inputs()
    with torch.no_grad():
        logps = chunked_logps(hidden, head, targets, 3)
    assert not logps.requires_grad
    torch.testing.assert_close(logps, full_logps(hidden, head, targets).detach())


def test_no_row_gives_zero_gradients():
    """A micro-batch without a pair keeps the graph whole: gradients of 0 rather than none."""
    hidden, head, targets, _ = inputs(rows=0)
    logps = chunked_logps(hidden, head, targets, 3)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert hidden.grad.shape == (0, WIDTH)
    assert head.grad.abs().sum() == 0.0


@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_bfloat16(chunk_rows):
    """Logits are rounded to bfloat16, everything after them is float32; gradients are rounded once more per chunk."""
    hidden, head, targets, weights = inputs(dtype=torch.bfloat16)
    wanted = full_logps(hidden, head, targets)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), (hidden, head))
    logps = chunked_logps(hidden, head, targets, chunk_rows)
    grads = torch.autograd.grad((logps * weights).sum(), (hidden, head))
    torch.testing.assert_close(logps, wanted, atol=1e-6, rtol=1e-6)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, wanted_grad, atol=0.02, rtol=0.02)


def test_autocast_is_the_same_in_backward():
    """Under autocast, float32 tensors give what their bfloat16 copies give, although backward runs outside of it."""
    hidden, head, targets, weights = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = chunked_logps(hidden, head, targets, 3)
    grads = torch.autograd.grad((logps * weights).sum(), (hidden, head))
    cast = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, head)]
    wanted = chunked_logps(*cast, targets, 3)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), cast)
    torch.testing.assert_close(logps, wanted)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad.float())


def test_logits_of_one_chunk_at_a_time():
    """No operation of forward or backward makes more than `chunk_rows` rows over the vocabulary."""
    hidden, head, targets, _ = inputs()
    with LargestLogits() as full:
        full_logps(hidden, head, targets).sum().backward()
    with LargestLogits() as chunked:
        chunked_logps(hidden, head, targets, 3).sum().backward()
    assert (full.rows, chunked.rows) == (ROWS, 3)


def test_chunk_rows_must_be_positive():
    with pytest.raises(ValueError, match="chunk_rows=0 must be at least 1"):
        chunked_logps(*inputs()[:3], 0)
