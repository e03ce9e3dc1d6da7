"""Share of generated answers that equal an expected one."""

from ivl_lightning.metrics.answer_score import AnswerScore


class ExactMatch(AnswerScore):
    """Exact match of whole answers, blanks at both ends aside; case and punctuation count.

    With `ignore_case=True` it is the official score of OCR-VQA and AI2D (lower case, stripped).
    """

    def __init__(self, *, ignore_case: bool = False) -> None:
        super().__init__()
        self.ignore_case = ignore_case

    def _against(self, answer: str, truth: str, question: str) -> float:
        return float(self._normalise(answer) == self._normalise(truth))

    def _normalise(self, text: str) -> str:
        text = text.strip()
        return text.lower() if self.ignore_case else text
