"""What was asked, what was answered, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Counts:
    """Of one dataset.

    Attributes:
        questions: that were answered.
        responses: to all of them.
        right, wrong: responses by their score; where nothing is judged (`dropout_ntp`) both stay 0.
        unclear: wrong responses without a clear final answer.
        unfinished: responses that were cut at `max_new_tokens`.
        all_right, all_wrong: questions without a wrong, or without a right response.
        pairs: that were written.
        skipped: responses and pairs that were not used, by reason.
        rejected: rows that were not asked, by reason.
    """

    questions: int = 0
    responses: int = 0
    right: int = 0
    wrong: int = 0
    unclear: int = 0
    unfinished: int = 0
    all_right: int = 0
    all_wrong: int = 0
    pairs: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, int | dict[str, int]]:
        """Plain values; `asdict` cannot copy a Counter."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**values, "skipped": dict(self.skipped), "rejected": dict(self.rejected)}


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a whole command.

    Attributes:
        meta: path of the meta.json that was written.
        datasets: name -> its counts.
        settings: of the command.
    """

    meta: str
    datasets: Mapping[str, Counts]
    settings: Mapping[str, Any]

    @property
    def pairs(self) -> int:
        """Of all datasets."""
        return sum(counts.pairs for counts in self.datasets.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `summary.json` holds them."""
        return {
            "pairs": self.pairs,
            "datasets": {name: counts.to_json() for name, counts in self.datasets.items()},
            "settings": dict(self.settings),
        }


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print a row for each dataset, and the reasons below.

    Args:
        summary: of a command.
        console: where to; the terminal by default.
    """
    columns = ("questions", "responses", "right", "wrong", "unclear", "all_right", "all_wrong", "pairs")
    table = Table(title="preference pairs", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("dataset", overflow="fold")
    for column in columns:
        # In two lines the headers fit 80 characters.
        table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    reasons = []
    for name, counts in summary.datasets.items():
        table.add_row(name, *(f"{getattr(counts, column):,}" for column in columns))
        lists = {"not asked": counts.rejected, "not used": counts.skipped, "cut": Counter(unfinished=counts.unfinished)}
        reasons += [f"{name}: {kind}: {_listed(own)}" for kind, own in lists.items() if own.total()]
    console = console or Console()
    console.print(table)
    console.print("\n".join(reasons), highlight=False, markup=False)


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
