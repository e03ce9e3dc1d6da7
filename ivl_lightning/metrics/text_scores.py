"""Scores of one answer against the expected one, each a pure function of two texts that returns 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchmetrics.functional.text import edit_distance

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d+)?|[-+]?\.\d+", re.IGNORECASE)
_YEAR = re.compile(r"20\d\d")
_OPTION = re.compile(r"(?:^|\s)\(?([A-H])[).:：、．]\s*(\S.*?)(?=\s+\(?[A-H][).:：、．]|\s*$)", re.MULTILINE)
_LETTER = re.compile(r"\(([A-H])\)(?:[.:]?\s.*)?|([A-H])(?:[).:](?:\s.*)?|[：、．].*)?", re.IGNORECASE | re.DOTALL)


def exact(answer: str, truth: str) -> float:
    """1 where the texts are the same but for case and blanks at both ends: the official score of OCR-VQA and AI2D."""
    return float(_plain(answer) == _plain(truth))


def relaxed(answer: str, truth: str, *, exact_years: bool = False) -> float:
    """1 where a number is within 5 % of the expected one; `exact` for everything else. The official score of ChartQA.

    A percent sign divides by 100, as in the official evaluation.

    Args:
        answer: to be judged.
        truth: the expected one.
        exact_years: an expected 2000 to 2099 must be met exactly: 5 % of a year are a century. Only the original's
            pipeline for preference data does so, not its evaluation.
    """
    given, wanted = _number_or_share(answer), _number_or_share(truth)
    if given is None or wanted is None or (exact_years and _YEAR.fullmatch(truth.strip())):
        return exact(answer, truth)
    return float(abs(given - wanted) <= 0.05 * abs(wanted))


def anls(answer: str, truth: str) -> float:
    """Normalized Levenshtein similarity, 0 from half of the characters on: DocVQA's and InfographicVQA's score.

    It is 1 - distance / length of the longer text where distance / length is below 0.5. The original's pipeline for
    preference data takes distance / length itself, which calls the worst answers right.
    """
    given, wanted = _plain(answer), _plain(truth)
    if given == wanted:
        return 1.0
    longest = max(len(given), len(wanted))
    # The lengths alone are that far apart: the distance of a page of text would take seconds.
    if 2 * abs(len(given) - len(wanted)) >= longest:
        return 0.0
    distance = int(edit_distance([given], [wanted], reduction="sum")) / longest
    return 1.0 - distance if distance < 0.5 else 0.0


def choice(answer: str, truth: str, question: str = "") -> float:
    """1 where both texts name the same option, by its letter ("B", "(B)", "B.", "B: text") or by its text.

    Args:
        answer: to be judged.
        truth: the expected one.
        question: holds the options ("A. text" on a line each, or "(A) text (B) text"). Where it holds none, letters
            are compared with letters and texts with texts.
    """
    options = options_of(question)
    given, wanted = _letter(answer, options), _letter(truth, options)
    return exact(answer, truth) if given is None or wanted is None else float(given == wanted)


def number(answer: str, truth: str) -> float:
    """1 where a number differs from the expected one by no more than 0.001; `exact` for everything else."""
    given, wanted = _number(answer), _number(truth)
    return exact(answer, truth) if given is None or wanted is None else float(abs(given - wanted) <= 1e-3)


def options_of(question: str) -> dict[str, str]:
    """Letter -> text of the options that a question lists, A to H."""
    return {letter: text.strip() for letter, text in _OPTION.findall(question)}


def _letter(text: str, options: Mapping[str, str]) -> str | None:
    for letter, option in options.items():
        if exact(text, option):
            return letter
    match = _LETTER.fullmatch(text.strip())
    return None if match is None else (match[1] or match[2]).upper()


def _number_or_share(text: str) -> float | None:
    text = text.strip()
    value = _number(text.removesuffix("%"))
    return value / 100 if value is not None and text.endswith("%") else value


def _number(text: str) -> float | None:
    # float() alone would also read "nan" and "infinity", and not the commas.
    text = text.strip()
    return float(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _plain(text: str) -> str:
    return text.strip().lower()
