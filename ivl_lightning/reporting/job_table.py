"""What the jobs of a multirun or of a sweep have come to, as a table: what was varied, the score, how each ended."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivl_lightning.reporting.table import NONE, duration, number, percent

Value = str | float
_MOST_DIGITS = 8
SHARES = ("val/score", "val/exact_match", "val/reward_accuracy")


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job.

    Attributes:
        number: of the job.
        varied: key -> value as written, of what sets it apart.
        state: how it ended, in a word.
        exit_code: of its process; None where it has not ended.
        score: None where it has none.
        seconds: wall time; NaN where it is not known.
        folder: its run folder.
        error: what failed; empty where nothing did.
    """

    number: int
    varied: dict[str, str]
    state: str
    exit_code: int | None
    score: float | None
    seconds: float
    folder: Path
    error: str = ""


@dataclass(frozen=True, slots=True)
class JobTable:
    """Jobs that can be compared.

    Attributes:
        folder: of all of them.
        command: that made them.
        metric: of the scores; None where no job has one.
        goal: `maximize` or `minimize`.
        rows: the jobs.
    """

    folder: Path
    command: str
    metric: str | None
    goal: str
    rows: Sequence[JobRow] = field(default_factory=tuple)

    @property
    def keys(self) -> list[str]:
        """What sets jobs apart, in the order in which it first appears."""
        return list(dict.fromkeys(key for row in self.rows for key in row.varied))

    @property
    def best(self) -> JobRow | None:
        """The first with the best score."""
        sign = -1.0 if self.goal == "minimize" else 1.0
        scored = [(sign * row.score, row) for row in self.rows if row.score is not None]
        return max(scored, key=lambda entry: entry[0])[1] if scored else None

    def score(self, row: JobRow) -> str:
        """A job's score as text."""
        return percent(row.score) if self.metric in SHARES else number(row.score)

    def columns(self) -> list[str]:
        """Titles of the table."""
        return ["job", *self.keys, self.metric or "score", "state", "wall time"]

    def cells(self, row: JobRow) -> list[str]:
        """Texts of a job's row, one per column."""
        varied = [_short(row.varied.get(key, NONE)) for key in self.keys]
        state = row.state if row.exit_code in (0, None) else f"{row.state} ({row.exit_code})"
        return [str(row.number), *varied, self.score(row), state, duration(row.seconds)]


def _short(text: str) -> str:
    # A number that was drawn at random has more digits than a table has room for; the files keep them.
    value = value_of(text)
    return number(value) if isinstance(value, float) and len(text) > _MOST_DIGITS else text


def value_of(text: str) -> Value:
    """A value as written: a finite number, or the text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else text


def print_job_table(table: JobTable, console: Console | None = None) -> None:
    """Print a row for each job; the best one is bold.

    Args:
        table: the jobs.
        console: where to; the terminal by default.
    """
    shown = Table(title=f"jobs in {table.folder}", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in table.columns():
        # Names of settings break at their dots.
        header = title.replace(".", ".\n").replace("/", "/\n")
        shown.add_column(header, justify="left" if title in (*table.keys, "state") else "right", overflow="fold")
    for row in table.rows:
        style = "bold" if row is table.best else "red" if row.error else ""
        # As they are: a list in brackets is no markup.
        shown.add_row(*map(Text, table.cells(row)), style=style)
    (console or Console()).print(shown)
