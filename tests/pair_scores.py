"""Preference pairs with given rewards, for tests of the losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ivl_lightning.structures import PairScores

BETA = 0.1


def from_log_ratios(
    chosen: Sequence[float] | Tensor,
    rejected: Sequence[float] | Tensor,
    *,
    chosen_tokens: Sequence[float] | None = None,
    rejected_tokens: Sequence[float] | None = None,
) -> PairScores:
    """Pairs whose reference gives every response the log-probability -20; one token each unless given."""
    policy = [torch.as_tensor(ratios) - 20.0 for ratios in (chosen, rejected)]
    reference = [torch.full_like(scores, -20.0) for scores in policy]
    tokens = [
        torch.ones_like(scores) if given is None else scores.new_tensor(given)
        for scores, given in zip(policy, (chosen_tokens, rejected_tokens), strict=True)
    ]
    for scores in policy:
        scores.requires_grad_()
    return PairScores(*policy, *reference, *tokens)


def from_rewards(chosen: Sequence[float] | Tensor, rejected: Sequence[float] | Tensor) -> PairScores:
    """Pairs with these rewards at the default beta, 0.1."""
    return from_log_ratios(torch.as_tensor(chosen) / BETA, torch.as_tensor(rejected) / BETA)
