"""Share of generated answers that equal the expected one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactMatch(Metric):
    """Exact match of whole answers, blanks at both ends aside; case and punctuation count.

    With `ignore_case=True` it is the official score of OCR-VQA and AI2D (lower case, stripped).
    """

    correct: Tensor
    total: Tensor
    higher_is_better = True

    def __init__(self, *, ignore_case: bool = False) -> None:
        super().__init__()
        self.ignore_case = ignore_case
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, generated: Sequence[str], expected: Sequence[str]) -> None:
        """Count pairs of answers; both sequences have the same length."""
        for answer, wanted in zip(generated, expected, strict=True):
            self.correct += self._normalise(answer) == self._normalise(wanted)
            self.total += 1

    def compute(self) -> Tensor:
        """Share in 0..1; 0 where nothing was counted."""
        return self.correct.float() / self.total.clamp(min=1)

    def _normalise(self, text: str) -> str:
        text = text.strip()
        return text.lower() if self.ignore_case else text
