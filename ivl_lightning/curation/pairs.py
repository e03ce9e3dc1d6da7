"""From the judged responses to a question to its pairs: right x wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ivl_lightning.constants import IMAGE_PLACEHOLDER, RESERVED_TOKENS


@dataclass(frozen=True, slots=True)
class Judged:
    """A response and what was found in it.

    Attributes:
        text: of the response.
        answer: its final answer; None where that is unclear, or where responses are not judged.
        score: 0 to 1; None where responses are not judged.
    """

    text: str
    answer: str | None
    score: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to a question."""

    chosen: Judged
    rejected: Judged


def unusable(text: str) -> str | None:
    """Why a response cannot be trained on: `empty` or `reserved_token`; None where it can."""
    if not text.strip():
        return "empty"
    return "reserved_token" if any(token in text for token in (*RESERVED_TOKENS, IMAGE_PLACEHOLDER)) else None


def right_by_wrong(
    right: Sequence[Judged], wrong: Sequence[Judged], *, most: int, rng: np.random.Generator
) -> tuple[list[Pair], Counter[str]]:
    """All pairs of a right and a wrong response with different texts, `most` of them at random.

    A pair is skipped where the right final answer is part of the wrong one ("red" in "dark red"), which may well be
    right too. Source: the original's `reasoning_data_pipeline`.

    Args:
        right, wrong: the responses to one question.
        most: pairs that are kept.
        rng: draws them.

    Returns:
        The pairs, in the order of the responses, and what was left out: responses `repeated`, `empty` or with a
        `reserved_token`; pairs `entailed` or `over_max_pairs`.
    """
    skipped: Counter[str] = Counter()
    right, wrong = (_distinct(responses, skipped) for responses in (right, wrong))
    pairs = []
    for chosen in right:
        for rejected in wrong:
            if _entailed(chosen, rejected):
                skipped["entailed"] += 1
            else:
                pairs.append(Pair(chosen, rejected))
    if len(pairs) > most:
        skipped["over_max_pairs"] += len(pairs) - most
        pairs = [pairs[number] for number in sorted(rng.choice(len(pairs), most, replace=False).tolist())]
    return pairs, skipped


def _distinct(responses: Sequence[Judged], skipped: Counter[str]) -> list[Judged]:
    kept: dict[str, Judged] = {}
    for response in responses:
        reason = "repeated" if response.text in kept else unusable(response.text)
        if reason is None:
            kept[response.text] = response
        else:
            skipped[reason] += 1
    return list(kept.values())


def _entailed(chosen: Judged, rejected: Judged) -> bool:
    assert chosen.answer is not None
    other = rejected.text.strip().splitlines()[-1] if rejected.answer is None else rejected.answer
    return chosen.answer.strip().lower() in other.strip().lower()
