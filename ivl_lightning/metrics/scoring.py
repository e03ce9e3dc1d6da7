"""Metrics by the names under which settings and meta.json know them."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

from ivl_lightning.config.schema import Metric
from ivl_lightning.metrics.answer_score import AnswerScore
from ivl_lightning.metrics.box_accuracy import BoxAccuracy
from ivl_lightning.metrics.exact_match import ExactMatch
from ivl_lightning.metrics.text_metrics import ANLS, MultipleChoice, NumberMatch, RelaxedAccuracy
from ivl_lightning.metrics.vqa_score import VQAScore

METRICS: Mapping[Metric, Callable[[], AnswerScore]] = {
    "exact_match": ExactMatch,
    "exact_match_ignore_case": partial(ExactMatch, ignore_case=True),
    "vqa_score": VQAScore,
    "anls": ANLS,
    "relaxed_accuracy": RelaxedAccuracy,
    "multiple_choice": MultipleChoice,
    "number_match": NumberMatch,
    "box_accuracy": BoxAccuracy,
}
"""Name -> makes the metric."""


def score(metric: Metric, generated: str, truths: Sequence[str], question: str = "") -> float:
    """Score of one answer, 0 to 1.

    Args:
        metric: a name of `METRICS`.
        generated: the answer.
        truths: what is right; at least one.
        question: with its options, for `multiple_choice`.
    """
    return _metric(metric).score(generated, truths, question)


@cache
def _metric(name: Metric) -> AnswerScore:
    return METRICS[name]()
