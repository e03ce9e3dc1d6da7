"""The comparison of progressive scaling in words: a table and a sentence for each sequel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ivl_lightning.constants import WEIGHTS_FOLDER
from ivl_lightning.reporting.scaling import Row, final_score
from ivl_lightning.reporting.table import NONE, percent

FRESH = "fresh"
_LONGEST = 44


def scaling_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the columns; the last two bear the control's final score."""
    goal = _goal(rows)
    until = f"until {goal}" if goal else "until the control's score"
    return ("run", "tower from", "steps", "tokens", "final score", f"tokens {until}", f"steps {until}")


def scaling_cells(rows: Sequence[Row], folder: Path) -> list[tuple[str, ...]]:
    """A row of texts for each sequel.

    Args:
        rows: of the comparison.
        folder: the run's, which paths are shown below.
    """
    return [
        (
            row.curve.name,
            FRESH if row.tower is None else shown_path(row.tower, folder),
            f"{row.curve.steps:,}",
            f"{row.curve.tokens:,}",
            percent(final_score(row.curve)),
            f"{row.reached.tokens:,}" if row.reached else NONE,
            f"{row.reached.steps:,}" if row.reached else NONE,
        )
        for row in rows
    ]


def scaling_sentences(rows: Sequence[Row]) -> list[str]:
    """What each sequel needs beside the control, and what its tower had been trained on before."""
    goal = _goal(rows)
    if goal is None:
        return ["No sequel has a vision tower that starts afresh, so there is nothing to compare with."]
    return [_sentence(row, goal) for row in rows if not row.control]


def scaling_headline(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The share of the control's tokens that the first carried sequel needs, and what it is."""
    shares = ((row.curve.name, row.share) for row in rows if row.donor and row.share is not None)
    return [(f"{share:.0%}", f"share of the control's tokens that {name} needs") for name, share in shares][:1]


def shown_path(path: str, folder: Path) -> str:
    """A path of weights, below the run's folder where it lies there, shortened in the middle where it is long."""
    place = Path(path)
    place = place.parent if place.name == WEIGHTS_FOLDER else place
    inside = place.is_relative_to(folder.resolve())
    return shortened(str(place.relative_to(folder.resolve()) if inside else place), _LONGEST)


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters: the middle gives way to an ellipsis."""
    if len(text) <= limit:
        return text
    # The end of a path says more than its beginning.
    end = (limit - 1) * 2 // 3
    return f"{text[: limit - 1 - end]}…{text[-end:]}"


def _goal(rows: Sequence[Row]) -> str | None:
    return next((percent(final_score(row.curve)) for row in rows if row.control), None)


def _sentence(row: Row, goal: str) -> str:
    name = row.curve.name
    if row.share is not None:
        text = f"{name} needs {row.share:.0%} of the control's tokens to reach {goal}."
    else:
        best = max(row.curve.measured, key=lambda one: one.score)
        text = (
            f"{name} does not reach the control's {goal}: its best score is {percent(best.score)}, "
            f"after {best.tokens:,} tokens."
        )
    if not row.tower_tokens:
        return text
    return f"{text} Its tower had been trained on {row.tower_tokens:,} tokens before; they are not counted."
