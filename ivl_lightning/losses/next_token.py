"""Next-token cross entropy over supervised positions only, reweighted and normalised.

Source of weights and of the two official normalisers: `modeling_internvl_chat.py` and `len2weight` of the original;
of the step normaliser: docs/differences.md.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ivl_lightning.autocast import in_autocast_dtype
from ivl_lightning.config.schema import Normaliser
from ivl_lightning.reweighting import REDUCTIONS

NORMALISERS = get_args(Normaliser)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_i w_i * CE(hidden_i @ head.T, target_i), the gradient taken in forward while a chunk's logits exist.

    Logits of only `chunk_rows` rows are alive at a time, once: they become softmax and gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = linear(hidden[rows], head).float()
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            place = (torch.arange(len(logits), device=logits.device), targets[rows])
            picked = logits[place]
            sums = logits.exp_().sum(dim=-1)
            losses[rows] = sums.log() - picked
            if grad_hidden is None and grad_head is None:
                continue
            logits.mul_((weights[rows] / sums)[:, None])
            logits[place] -= weights[rows]
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head
            if grad_head is not None:
                # In place: the product by itself would take the head's memory once more.
                grad_head.addmm_(grad_logits.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # In place. A second backward through the same graph is refused: torch sees that what was saved has changed.
        scaled = [None if grad is None else grad.mul_(grads[0].to(grad.dtype)) for grad in ctx.saved_tensors]
        return scaled[0], scaled[1], None, None, None


class NextTokenLoss(nn.Module):
    """Reweighted next-token loss.

    Args:
        reduction: `token`, `sample` or `square`; the data module weighs the labels by it.
        normaliser: what the weighted sum S is divided by. `step` (default): W, the planned sum of weights of the whole
            optimizer step. `micro_batch` (official with all-gather): the mean over ranks of the micro-batch's own sum.
            `micro_batch_local` (official without): the rank's own sum.
        chunk_rows: supervised tokens whose logits exist at one time.

    Raises:
        ValueError: an unknown reduction or normaliser, or chunk_rows below 1.
    """

    def __init__(self, reduction: str = "square", normaliser: str = "step", chunk_rows: int = 4096) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"loss.reduction={reduction!r} is not known: use one of {', '.join(REDUCTIONS)}")
        if normaliser not in NORMALISERS:
            raise ValueError(f"loss.normaliser={normaliser!r} is not known: use one of {', '.join(NORMALISERS)}")
        if chunk_rows < 1:
            raise ValueError(f"loss.chunk_rows={chunk_rows} must be at least 1")
        self.reduction = reduction
        self.normaliser = normaliser
        self.chunk_rows = chunk_rows

    def forward(self, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of cross entropies.

        Args:
            hidden: `[n, D]` hidden states that predict a supervised token.
            head: `[V, D]` weight of the output head.
            targets: `[n]` the tokens.
            weights: `[n]` float32 weight of each.

        Returns:
            S, a float32 scalar, and the unweighted cross entropies `[n]`, without gradient.
        """
        # Backward runs outside of autocast and must see the same logits.
        hidden, head = in_autocast_dtype(hidden, head)
        return _ChunkedCrossEntropy.apply(hidden, head, targets, weights, self.chunk_rows)

    def normalise(self, weighted_sum: Tensor, weights: Tensor, step_weight: float, packs_per_step: int) -> Tensor:
        """The micro-batch's loss, such that accumulation and rank averaging give the wanted ratio.

        The trainer divides by the accumulation A and the strategy averages over R ranks, so `step` returns
        A * R * S / W: summed over the step's micro-batches that is (sum of S) / W.

        Args:
            weighted_sum: S of this micro-batch.
            weights: `[n]` its label weights.
            step_weight: W, planned over the whole step.
            packs_per_step: A * R.
        """
        if self.normaliser == "step":
            return weighted_sum * (packs_per_step / step_weight)
        total = weights.sum()
        if self.normaliser == "micro_batch" and dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            total = total / dist.get_world_size()
        # 0 / 0 is 0: a micro-batch without a label teaches nothing.
        return weighted_sum / torch.where(total > 0, total, torch.ones_like(total))
