"""What all preference heads have in common."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor, nn

from ivl_lightning.structures import PairScores


class PairHead(nn.Module):
    """A loss over preference pairs, not yet reduced.

    Attributes:
        normalised_by: what the sum over pairs is divided by: the number of `pairs`, or the sum of their `labels`'
            weights.
    """

    normalised_by: ClassVar[Literal["pairs", "labels"]] = "pairs"

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`; B may be 0."""
        raise NotImplementedError

    def end_step(self) -> None:
        """Called on every rank once the optimizer has stepped; for heads with a state."""


class RewardHead(PairHead):
    """A head over implicit rewards, beta * log(policy / reference).

    Args:
        beta: factor on log-ratios, above 0; how firmly the policy is held to the reference. TRL's default is 0.1.

    Raises:
        ValueError: beta is not a number above 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        if not 0.0 < beta < math.inf:
            raise ValueError(f"beta={beta} must be a number above 0; 0.1 is usual")
        self.beta = beta


class SmoothedHead(RewardHead):
    """A head over implicit rewards where a share of the labels may be wrong.

    Args:
        beta: see `RewardHead`.
        label_smoothing: probability that a pair's answers were swapped, from 0 to below 0.5.

    Raises:
        ValueError: beta or label_smoothing is out of range.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        if not 0.0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 0.5; 0 turns it off")
        self.label_smoothing = label_smoothing
