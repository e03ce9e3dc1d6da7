"""Absolute heads: how good each response is on its own.

Formulas: `dpo_loss` of TRL 0.10.1, on which the official trainer builds; papers are named at each head. r_c and r_r are
the rewards beta * log(policy / reference) of the chosen and the rejected response.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ivl_lightning.config.schema import ShiftUpdate
from ivl_lightning.losses.pair_head import RewardHead
from ivl_lightning.losses.rewards import implicit_rewards, log_ratios
from ivl_lightning.losses.running_shift import RunningShift
from ivl_lightning.structures import PairScores


class BCOPair(RewardHead):
    """BCO: -log sigmoid(r_c - d) - log sigmoid(-(r_r - d)) with d, the running mean of rewards, as the threshold.

    Source: arXiv:2404.04656; the quality part of MPO, arXiv:2411.10442.

    Args:
        beta: see `RewardHead`.
        update: see `RunningShift`; with `step`, `end_step` must be called.

    Attributes:
        shift: d.

    Raises:
        ValueError: beta is out of range, or the update is not known.
    """

    def __init__(self, beta: float = 0.1, update: ShiftUpdate = "micro_batch") -> None:
        super().__init__(beta)
        self.shift = RunningShift(update)

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`."""
        chosen, rejected = log_ratios(pairs)
        shift = self.shift(implicit_rewards(pairs, self.beta))
        return -logsigmoid(self.beta * chosen - shift) - logsigmoid(shift - self.beta * rejected)

    def end_step(self) -> None:
        """Fold the step's rewards into the shift; see `RunningShift.end_step`."""
        self.shift.end_step()


class SPPOHard(RewardHead):
    """SPPO with hard labels: (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2 of the log-ratios a and b.

    Source: arXiv:2405.00675, eq. 4.7, where the chosen response wins with probability 1.

    Args:
        beta: see `RewardHead`.
    """

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`."""
        chosen, rejected = log_ratios(pairs)
        aim = 0.5 / self.beta
        return (chosen - aim) ** 2 + (rejected + aim) ** 2


class NCAPair(RewardHead):
    """NCA: -log sigmoid(r_c) - log sigmoid(-r_c) / 2 - log sigmoid(-r_r) / 2.

    Source: arXiv:2402.05369.

    Args:
        beta: see `RewardHead`.
    """

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`."""
        chosen, rejected = (self.beta * ratios for ratios in log_ratios(pairs))
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
