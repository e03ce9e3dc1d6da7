"""The reward shift of BCO: a running mean of rewards that is part of the state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ivl_lightning.config.schema import ShiftUpdate

SHIFT_UPDATES = get_args(ShiftUpdate)


class RunningShift(nn.Module):
    """Cumulative mean of rewards over the whole run and over all ranks, updated in train mode only.

    Source: `RunningMoments` of TRL 0.10.1 and its use in the official trainer (`micro_batch`), which loses the mean
    when a run is resumed, and updates it in evaluation too.

    Args:
        update: what counts once, and when. `micro_batch` (official): each rank's micro-batch, whatever its size,
            before the shift is used. `pair`: each pair, before the shift is used. `step`: each pair, once the step is
            done, so that the shift is the same on any number of ranks and any accumulation.

    Attributes:
        mean: float64 scalar, in the state dict; 0 before the first update.
        count: float64 scalar, in the state dict, what was averaged: micro-batches or pairs. The original starts at
            1e-24, against a division by zero.
        pending: float64 `[2]`, sum and count of this rank's step so far; empty between steps, so never saved.

    Raises:
        ValueError: an unknown update.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, update: ShiftUpdate = "micro_batch") -> None:
        super().__init__()
        if update not in SHIFT_UPDATES:
            raise ValueError(f"update={update!r} is not known: use one of {', '.join(SHIFT_UPDATES)}")
        self.update = update
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        # Not a buffer: DDP copies the buffers of rank 0 to all ranks, and this one differs between them.
        self.pending = torch.zeros(2, dtype=torch.float64)

    def forward(self, rewards: Tensor) -> Tensor:
        """The shift to use with these rewards.

        With `micro_batch` and `pair` every rank must take part, also one without a pair.

        Args:
            rewards: `[B, 2]`, rewards of chosen and rejected responses; B may be 0.

        Returns:
            A scalar of the rewards' dtype, without gradient.
        """
        if self.training:
            self._take(rewards.detach().double())
        return self.mean.to(rewards.dtype, copy=True)

    @torch.no_grad()
    def end_step(self) -> None:
        """Fold the step's pairs of all ranks in, for `update=step`; every rank must call it at each optimizer step."""
        if self.update == "step":
            self._fold(self.pending)
            self.pending = torch.zeros_like(self.pending)

    def _take(self, rewards: Tensor) -> None:
        pairs = rewards.mean(dim=1)
        total = torch.stack((pairs, torch.ones_like(pairs))).sum(dim=1)
        if self.update == "micro_batch":
            total = total / max(len(pairs), 1)
        if self.update == "step":
            self.pending = self.pending + total
        else:
            self._fold(total)

    def _fold(self, total: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        self.count += total[1]
        # A count below 1 is 0, and then the sum is 0 as well.
        self.mean += (total[0] - total[1] * self.mean) / self.count.clamp(min=1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A module cast to bfloat16 must not lose the mean of thousands of micro-batches: only the device may change.
        device = fn(torch.empty_like(self.mean)).device
        self.pending = self.pending.to(device)
        return super()._apply(lambda tensor: tensor.to(device), recurse)
