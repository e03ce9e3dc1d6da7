"""Relative heads: how much more the chosen response earns than the rejected one.

Formulas: `dpo_loss` of TRL 0.10.1, on which the official trainer builds; papers are named at each head. With log-ratios
a = log(policy / reference) of the chosen and b of the rejected response, the margin is m = beta * (a - b).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ivl_lightning.losses.pair_head import RewardHead, SmoothedHead
from ivl_lightning.losses.rewards import log_ratios
from ivl_lightning.structures import PairScores


def _margin(pairs: PairScores, beta: float) -> Tensor:
    chosen, rejected = log_ratios(pairs)
    return beta * (chosen - rejected)


def _smoothed_sigmoid(margin: Tensor, smoothing: float) -> Tensor:
    return -(1.0 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


class SigmoidPreference(SmoothedHead):
    """DPO: -log sigmoid(m), with share e of labels smoothed -(1 - e) log sigmoid(m) - e log sigmoid(-m).

    Source: arXiv:2305.18290, eq. 7; the preference part of MPO, arXiv:2411.10442.

    Args:
        beta, label_smoothing: see `SmoothedHead`.
    """

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`."""
        return _smoothed_sigmoid(_margin(pairs, self.beta), self.label_smoothing)


class RobustPreference(SmoothedHead):
    """Robust DPO, unbiased under swapped labels: (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2e).

    Source: arXiv:2403.00409.

    Args:
        beta, label_smoothing: see `SmoothedHead`; e = 0 is DPO.
    """

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`."""
        margin, share = _margin(pairs, self.beta), self.label_smoothing
        return (share * logsigmoid(-margin) - (1.0 - share) * logsigmoid(margin)) / (1.0 - 2.0 * share)


class EXOPair(SmoothedHead):
    """EXO: reverse Kullback-Leibler divergence from (sigmoid(m), sigmoid(-m)) to the smoothed label (1 - e, e).

    Source: arXiv:2402.00856, eq. 16.

    Args:
        beta, label_smoothing: see `SmoothedHead`; e = 0, which has no finite divergence, stands for 1e-3.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta, label_smoothing or 1e-3)

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`."""
        margin, share = _margin(pairs, self.beta), self.label_smoothing
        chosen = margin.sigmoid() * (logsigmoid(margin) - math.log(1.0 - share))
        return chosen + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(share))


class HingePreference(RewardHead):
    """SLiC: max(0, 1 - m).

    Source: arXiv:2305.10425, eq. 1, with log-ratios in place of log-probabilities.

    Args:
        beta: see `RewardHead`.
    """

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`."""
        return torch.relu(1.0 - _margin(pairs, self.beta))


class IPO(RewardHead):
    """IPO: (a / tokens - b / tokens - 1 / (2 beta))^2, on log-probabilities averaged over each response's tokens.

    Source: arXiv:2310.12036, eq. 17, where beta is called tau; the average is the official trainer's.

    Args:
        beta: see `RewardHead`.
    """

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each pair, `[B]`."""
        chosen, rejected = log_ratios(pairs)
        # A response without a token has the log-probability 0, whatever it is divided by.
        gap = chosen / pairs.chosen_tokens.clamp(min=1.0) - rejected / pairs.rejected_tokens.clamp(min=1.0)
        return (gap - 1.0 / (2.0 * self.beta)) ** 2


class AOT(SmoothedHead):
    """AOT, unpaired data: DPO on margins between the sorted policy gaps and the sorted reference gaps.

    A gap is log-probability of the chosen minus that of the rejected response. Sorting is within the micro-batch, so
    the loss depends on which pairs share one; with a single pair it is DPO. Entry i belongs to the i-th smallest gaps.

    Source: arXiv:2406.05882.

    Args:
        beta, label_smoothing: see `SmoothedHead`.
    """

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each rank of the sorted gaps, `[B]`."""
        policy = (pairs.policy_chosen - pairs.policy_rejected).sort().values
        reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
        return _smoothed_sigmoid(self.beta * (policy - reference), self.label_smoothing)


class AOTPair(SmoothedHead):
    """AOT, paired data: DPO on margins between the sorted chosen log-ratios and the sorted rejected ones.

    Sorting is within the micro-batch, so the loss depends on which pairs share one; with a single pair it is DPO. Entry
    i belongs to the i-th smallest log-ratios.

    Source: arXiv:2406.05882.

    Args:
        beta, label_smoothing: see `SmoothedHead`.
    """

    def forward(self, pairs: PairScores) -> Tensor:
        """Loss of each rank of the sorted log-ratios, `[B]`."""
        chosen, rejected = (ratios.sort().values for ratios in log_ratios(pairs))
        return _smoothed_sigmoid(self.beta * (chosen - rejected), self.label_smoothing)
