"""What a response says in the end, and whether that is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from ivl_lightning.config.preferences import Judge, PromptStyle
from ivl_lightning.metrics import text_scores

RIGHT_ABOVE = 0.9
"""A response is right where its score is above this (the original's `reasoning_data_pipeline`)."""

_AROUND = "* \t\r\n"
_MOST_TRIGGERS = 2
_FEWEST_NEWLINES = 2
_TRIGGERS: dict[PromptStyle, re.Pattern[str]] = {
    "cot_en": re.compile(r"\**final answer\**\s*[:：]", re.IGNORECASE),
    "cot_zh": re.compile(r"\**答案\**\s*[:：]"),
}


def final_answer(response: str, style: PromptStyle) -> str | None:
    """The answer a response ends with, without emphasis and full stop; None where it is unclear.

    With `plain` the whole response is the answer. Otherwise it is the text behind the last trigger ("Final answer:"
    or "答案:"). It is unclear unless there are one or two triggers, text before the first, at least two newlines, and
    a single line behind the last. Source: the original's `reasoning_data_pipeline`.
    """
    if style == "plain":
        return tidy(response) or None
    parts = _TRIGGERS[style].split(response)
    triggers = len(parts) - 1
    if not 1 <= triggers <= _MOST_TRIGGERS or not parts[0].strip() or response.count("\n") < _FEWEST_NEWLINES:
        return None
    answer = tidy(parts[-1])
    return answer if answer and "\n" not in answer else None


def tidy(answer: str) -> str:
    """The answer without blanks and `**` at its ends and without a full stop."""
    return answer.strip(_AROUND).removesuffix(".").removesuffix("。").strip(_AROUND)


def score(answer: str | None, truth: str, question: str, judge: Judge) -> float:
    """Score of a final answer, 0 to 1.

    Args:
        answer: None, an unclear one, scores 0.
        truth: the answer in the data.
        question: with its options, for `choice`.
        judge: which score.
    """
    if answer is None:
        return 0.0
    scores: dict[Judge, Callable[[str, str], float]] = {
        "exact": text_scores.exact,
        # Pairs must not teach that a wrong year is right.
        "relaxed": partial(text_scores.relaxed, exact_years=True),
        "anls": text_scores.anls,
        "choice": partial(text_scores.choice, question=question),
        "number": text_scores.number,
    }
    return scores[judge](answer, tidy(truth))
