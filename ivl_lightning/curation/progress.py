"""How far the command is: a bar on a terminal, a line a minute in a log file."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_SAY_SECONDS = 60.0
_SPEED_SECONDS = 600.0
"""Over which the rate is taken: batches are few and slow."""


class QuestionProgress:
    """Counts the questions of all datasets; a context manager.

    Args:
        title: what is done with them.
        total: questions.
        done: questions that an earlier process was done with.
        show: false shows nothing.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, show: bool) -> None:
        self.title = title
        self.total = total
        self.done = self._first = done
        terminal = sys.stderr.isatty()
        self._say = show and not terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._bar = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            disable=not (show and terminal),
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._task = self._bar.add_task(title, total=total, completed=done)
        self._began = self._said = time.monotonic()

    def __enter__(self) -> QuestionProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, dataset: str, questions: int) -> None:
        """Count questions of a dataset."""
        self.done += questions
        title = f"{self.title} {dataset}"
        self._bar.update(self._task, description=title, completed=self.done)
        now = time.monotonic()
        if self._say and now - self._said > _SAY_SECONDS:
            self._said = now
            rate = (self.done - self._first) / (now - self._began)
            left = (self.total - self.done) / rate / 60
            count = f"{self.done:,} of {self.total:,} questions"
            line = f"{title}: {count}, {rate:,.2f} questions/s, {left:,.0f} min left"
            print(line, file=sys.stderr, flush=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Questions per second, once they are known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.2f} questions/s")
