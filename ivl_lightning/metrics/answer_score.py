"""Means of scores of answers, added up over batches and ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

Truths = str | Sequence[str]
"""What is right: one text, or several of which each is."""


class AnswerScore(Metric):
    """Mean score of answers; a subclass says what one answer scores against one truth, 0 to 1.

    Of several truths the best counts.
    """

    total: Tensor
    count: Tensor
    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        # Ranks add up shares in another order than one process: in float64 nobody sees it.
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, generated: Sequence[str], truths: Sequence[Truths], questions: Sequence[str] | None = None
    ) -> None:
        """Count answers.

        Args:
            generated: n answers.
            truths: of each answer what is right.
            questions: of each answer; only some scores look at it. None for n empty ones.

        Raises:
            ValueError: sequences of different lengths, or an answer without a truth.
        """
        questions = [""] * len(generated) if questions is None else questions
        for answer, right, question in zip(generated, truths, questions, strict=True):
            self.total += self.score(answer, (right,) if isinstance(right, str) else right, question)
            self.count += 1

    def compute(self) -> Tensor:
        """Mean in 0..1; 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)

    def score(self, answer: str, truths: Sequence[str], question: str = "") -> float:
        """Score of one answer, 0 to 1.

        Raises:
            ValueError: there is no truth.
        """
        return max(self._against(answer, truth, question) for truth in truths)

    def _against(self, answer: str, truth: str, question: str) -> float:
        """Score against one truth."""
        raise NotImplementedError
