"""How far a long pass of a model over data is: a bar on a terminal, a line a minute in a log file."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_SAY_SECONDS = 60.0
_SPEED_SECONDS = 600.0
"""Over which the rate is taken: batches are few and slow."""


class PassProgress:
    """Counts what a model is done with; a context manager.

    Args:
        title: what is done.
        unit: what is counted, in the plural.
        total: of them.
        done: of them by an earlier process.
        show: false shows nothing.
    """

    def __init__(self, title: str, unit: str, total: int, done: int = 0, *, show: bool) -> None:
        self.title = title
        self.unit = unit
        self.total = total
        self.done = self._first = done
        terminal = sys.stderr.isatty()
        self._say = show and not terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            disable=not (show and terminal),
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._task = self._bar.add_task(title, total=total, completed=done)
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, dataset: str, count: int) -> None:
        """Count some of a dataset."""
        self.done += count
        title = f"{self.title} {dataset}"
        self._bar.update(self._task, description=title, completed=self.done)
        now = time.monotonic()
        if self._say and now - self._said > _SAY_SECONDS:
            self._said = now
            rate = (self.done - self._first) / (now - self._began)
            left = (self.total - self.done) / rate / 60
            done = f"{self.done:,} of {self.total:,} {self.unit}"
            print(f"{title}: {done}, {rate:,.2f} {self.unit}/s, {left:,.0f} min left", file=sys.stderr, flush=True)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Units per second, once they are known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.2f} {self.unit}/s")
