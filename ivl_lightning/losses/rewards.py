"""What a pair earns under the policy, measured against the reference."""

import torch
from torch import Tensor

from ivl_lightning.structures import PairScores


def log_ratios(pairs: PairScores) -> tuple[Tensor, Tensor]:
    """log(policy / reference) of the chosen and of the rejected responses, `[B]` each."""
    return pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected


def implicit_rewards(pairs: PairScores, beta: float) -> Tensor:
    """Rewards beta * log(policy / reference) without gradient, `[B, 2]`: chosen and rejected.

    Source: DPO, arXiv:2305.18290, section 5.1, without the prompt's own term.
    """
    return beta * torch.stack(log_ratios(pairs), dim=1).detach()
