"""The scores of `text_scores` as metrics."""

from ivl_lightning.metrics.answer_score import AnswerScore
from ivl_lightning.metrics.text_scores import anls, choice, number, relaxed


class ANLS(AnswerScore):
    """Average normalized Levenshtein similarity: DocVQA, InfographicVQA, ST-VQA; see `text_scores.anls`."""

    def _against(self, answer: str, truth: str, question: str) -> float:
        return anls(answer, truth)


class RelaxedAccuracy(AnswerScore):
    """Numbers within 5 %, else exact match: ChartQA; see `text_scores.relaxed`."""

    def _against(self, answer: str, truth: str, question: str) -> float:
        return relaxed(answer, truth)


class MultipleChoice(AnswerScore):
    """The same option by letter or by text, options as the question lists them; see `text_scores.choice`."""

    def _against(self, answer: str, truth: str, question: str) -> float:
        return choice(answer, truth, question)


class NumberMatch(AnswerScore):
    """Numbers that differ by no more than 0.001, else exact match; see `text_scores.number`."""

    def _against(self, answer: str, truth: str, question: str) -> float:
        return number(answer, truth)
