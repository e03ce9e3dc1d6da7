"""The head that keeps the chosen responses likely: next-token loss, reweighted."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivl_lightning.losses.pair_head import PairHead
from ivl_lightning.reweighting import label_weight
from ivl_lightning.structures import PairScores


def label_weights(tokens: Tensor, reduction: str) -> Tensor:
    """`reweighting.label_weight` of many responses: `[B]` weights of a label from `[B]` numbers of labels.

    Raises:
        ValueError: the reduction is not known.
    """
    # The weight is a power of the number of labels; at 2 its binary logarithm is the exponent.
    exponent = math.log2(label_weight(2, reduction))
    return torch.where(tokens > 0, tokens.clamp(min=1.0) ** exponent, torch.zeros_like(tokens))


class SFT(PairHead):
    """Negative log-likelihood of the chosen response, each of its x labels weighed by the reweighting rule.

    Divided by the sum of all labels' weights it is the mean over responses of their token means (`sample`), or the mean
    over all tokens (`token`). The MPO paper's is `sample`; the official trainer's is `token` over a micro-batch, which
    is the same where a micro-batch is one pair.

    Source: arXiv:2411.10442, generation loss.

    Args:
        reduction: `token`, `sample` or `square`.

    Raises:
        ValueError: the reduction is not known.
    """

    normalised_by: ClassVar[Literal["pairs", "labels"]] = "labels"

    def __init__(self, reduction: str = "sample") -> None:
        super().__init__()
        label_weight(1, reduction)
        self.reduction = reduction

    def forward(self, pairs: PairScores) -> Tensor:
        """Weighted sum of each chosen response's token losses, `[B]`."""
        return -label_weights(pairs.chosen_tokens, self.reduction) * pairs.policy_chosen
