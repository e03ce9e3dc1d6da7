"""What a terminal shows while jobs run: how many are done, where each of the others is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ivl_lightning.constants import METRICS_NAME
from ivl_lightning.launch.finished import read_finished
from ivl_lightning.launch.job import log_lines
from ivl_lightning.launch.planned_jobs import JobResult, PlannedJob

_LAST_BYTES = 8_192


class JobProgress:
    """A line for each job that starts or ends; on a terminal also a bar, and where each running job is.

    Args:
        total: number of jobs; None where nobody knows.
        console: where to.
    """

    def __init__(self, total: int | None, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._all = self._progress.add_task("jobs", total=total, note="")
        self._tasks: dict[int, TaskID] = {}
        self._failed = 0

    def __enter__(self) -> JobProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def told(self, text: str) -> None:
        """Print a line as it is, above the bars."""
        self._console.out(text, highlight=False)

    def started(self, planned: PlannedJob, how: str = "") -> None:
        """A job runs, or is submitted."""
        self.told(f"{planned.name} -> {planned.job.run_dir}{how}")
        stages = sum(map(len, planned.chains))
        self._tasks[planned.job.number] = self._progress.add_task(f"  job {planned.job.number}", total=stages, note="")

    def ended(self, result: JobResult) -> None:
        """A job has ended."""
        number, failed = result.planned.job.number, result.state == "failed"
        self.told(f"job {number} {result.state}" + (f" with exit code {result.exit_code}" if failed else ""))
        self._failed += failed
        self._progress.remove_task(self._tasks.pop(number))
        self._progress.update(self._all, advance=1, note=f"{self._failed} failed" if self._failed else "")

    def skipped(self, planned: PlannedJob) -> None:
        """A job was finished before."""
        self.told(f"{planned.name} is finished, skipped")
        self._progress.advance(self._all)

    def look(self, running: Iterable[PlannedJob]) -> None:
        """Show where the running jobs are."""
        if self._progress.disable:
            return
        for planned in running:
            done, where = place_of(planned)
            self._progress.update(self._tasks[planned.job.number], completed=done, note=where)


class LogFollower:
    """Reads what is appended to a log from now on.

    Args:
        log: need not exist yet.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = log.stat().st_size if log.is_file() else 0

    def new_lines(self) -> list[str]:
        """Whole lines since the last call."""
        if not self._log.is_file():
            return []
        with self._log.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        return log_lines(whole)


def place_of(planned: PlannedJob) -> tuple[int, str]:
    """How many stages a job has finished, and in which and how far it is."""
    folders = [Path(config.run_dir) / name for chain in planned.chains for name, config in chain.items()]
    for done, folder in enumerate(folders):
        if read_finished(folder) is None:
            step = _last_step(folder / METRICS_NAME)
            return done, folder.name if step is None else f"{folder.name}, step {step}"
    return len(folders), ""


def _last_step(metrics: Path) -> int | None:
    if not metrics.is_file():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _LAST_BYTES))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.startswith(b'{"step"') and line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else None
