"""Rows that a stage did not use, counted by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ivl_lightning.reporting.run_folder import StageFolder

FIRST_LINES = 10


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What a stage's ledger says.

    Attributes:
        stage: its name.
        counts: reason -> rows, most frequent first.
        total: rows left out.
        first: the first lines of the ledger.
        message: one sentence where there is nothing to count.
    """

    stage: str
    counts: dict[str, int]
    total: int
    first: list[dict[str, Any]]
    message: str


def left_out(stage: StageFolder) -> LeftOut:
    """Count a stage's ledger; where its file is gone the counts of done.json remain."""
    counts = Counter(line["reason"] for line in stage.ledger) or Counter(stage.summary.rejected)
    return LeftOut(
        stage=stage.name,
        counts=dict(counts.most_common()),
        total=counts.total(),
        first=stage.ledger[:FIRST_LINES],
        message="every row was used" if stage.finished else "none so far; the stage is not finished",
    )
