"""Log-probabilities of given tokens, without all logits at one time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ivl_lightning.autocast import in_autocast_dtype


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden_i @ head.T)[target_i]; backward makes each chunk's logits again.

    What weighs a log-probability is known only once all of a response have been summed, so unlike the next-token loss
    the gradient cannot be taken in forward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        log_sums = torch.empty_like(logps)
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = linear(hidden[rows], head).float()
            log_sums[rows] = logits.logsumexp(dim=-1)
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - log_sums[rows]
        ctx.save_for_backward(hidden, head, targets, log_sums)
        ctx.chunk_rows = chunk_rows
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, head, targets, log_sums = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            grad_logits = linear(hidden[rows], head).float().sub_(log_sums[rows, None]).exp_().neg_()
            grad_logits[torch.arange(len(grad_logits), device=hidden.device), targets[rows]] += 1.0
            grad_logits = grad_logits.mul_(grad_logps[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head
            if grad_head is not None:
                # In the head's dtype: float32 beside a bfloat16 head would take twice the head's memory again. The
                # product is summed in float32 and rounded once per chunk, and there are few chunks.
                grad_head.addmm_(grad_logits.T, hidden[rows])
        return grad_hidden, grad_head, None, None


def chunked_logps(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Log-probability of each target under the output head, in float32.

    Logits of only `chunk_rows` rows are alive at a time, in forward and in backward. Kept for backward are the inputs
    and one number per row.

    Args:
        hidden: `[n, D]` hidden states that predict a supervised token; n may be 0.
        head: `[V, D]` weight of the output head, of the same dtype.
        targets: int64 `[n]`, the tokens.
        chunk_rows: rows whose logits exist at one time, at least 1.

    Returns:
        float32 `[n]`.

    Raises:
        ValueError: chunk_rows below 1.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1")
    # Backward runs outside of autocast and must see the same logits.
    hidden, head = in_autocast_dtype(hidden, head)
    return _ChunkedLogps.apply(hidden, head, targets, chunk_rows)
