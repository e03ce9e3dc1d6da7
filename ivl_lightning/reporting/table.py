"""The table of stages, for the terminal and for the report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

NONE = "none"
MEAN_SCORE = "val/score"
"""Mean over the answered datasets of each one's own metric."""
OLD_MEAN_SCORE = "val/exact_match"
"""Its name where every dataset was scored by exact match, before there were other metrics."""
FOLDED = "what trained"
REWARD_ACCURACY = "val/reward_accuracy"
_WIDEST_NAME = len("instruction_tuning")
COLUMNS = ("stage", FOLDED, "steps", "loss first -> last", "score", "reward accuracy", "wall time")


class StageResult(Protocol):
    """What the table needs to know of a stage."""

    @property
    def stage(self) -> str:
        """Its name."""

    @property
    def trained(self) -> Sequence[str]:
        """Parts that trained."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def loss_first(self) -> float:
        """Training loss of the first logged step."""

    @property
    def loss_last(self) -> float:
        """Training loss of the last logged step."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Last validation metrics, by their logged names."""

    @property
    def seconds(self) -> float:
        """Wall time."""


def print_stage_table(results: Iterable[StageResult], console: Console | None = None) -> None:
    """Print what each stage trained and reached.

    Args:
        results: one per stage, in order; a stage of a sequel may be named `FOLDER: STAGE`.
        console: where to; the terminal by default.
    """
    table = Table(title="stages", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for position, name in enumerate(COLUMNS):
        # Short two-line headers and folded lists of parts fit 80 characters; names and numbers stay whole.
        header = name.replace("accuracy", "acc.").replace(" ", "\n", 1)
        table.add_column(header, justify="left" if position < 2 else "right", no_wrap=name != FOLDED)
    for result in results:
        name, *others = stage_cells(result)
        # As they are: a folder's name in brackets is no markup.
        table.add_row(Text(_narrow(name)), *(Text(cell) for cell in others))
    (console or Console()).print(table)


def _narrow(name: str) -> str:
    """A stage's name, what stands before a colon on lines of its own, so that the table fits 80 characters."""
    parts = name.replace(": ", ":\n").splitlines()
    return "\n".join(textwrap.fill(part, _WIDEST_NAME, break_on_hyphens=False) for part in parts)


def stage_cells(result: StageResult) -> tuple[str, ...]:
    """The texts of a stage's row, one per column."""
    return (
        result.stage,
        ", ".join(result.trained) or NONE,
        f"{result.steps:,}",
        _losses(result.loss_first, result.loss_last),
        percent(mean_score(result.scores)),
        percent(result.scores.get(REWARD_ACCURACY)),
        duration(result.seconds),
    )


def mean_score(scores: Mapping[str, float]) -> float | None:
    """The mean score among the last validation metrics; None where nothing was answered."""
    return scores.get(MEAN_SCORE, scores.get(OLD_MEAN_SCORE))


def _losses(first: float, last: float) -> str:
    return NONE if math.isnan(first) and math.isnan(last) else f"{_loss(first)} -> {_loss(last)}"


def _loss(value: float) -> str:
    # Two digits of a small loss are enough, and its zeros take the room of the third.
    return number(value, 2 if abs(value) < 0.1 else 3)


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return NONE if share is None or math.isnan(share) else f"{share:.1%}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; the largest two that matter."""
    if math.isnan(seconds):
        return NONE
    if round(seconds) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
