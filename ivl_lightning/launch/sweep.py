"""A search on this machine: suggested runs become jobs, their metrics are read while they train, hopeless ones stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.job import JobOutcome
from ivl_lightning.launch.job_progress import JobProgress
from ivl_lightning.launch.jobs import LocalJobs
from ivl_lightning.launch.planned_jobs import JobResult, PlannedJob, State, ended
from ivl_lightning.launch.sweep_runs import Search
from ivl_lightning.launch.sweep_search import Trial, TrialState, hopeless, suggest
from ivl_lightning.launch.sweep_state import SweepRun, SweepState, check_comparable, comparable, read_state

_LOOK_SECONDS = 1.0
_IDLE = 20
_SEEN_AS: dict[State, TrialState] = {
    "waiting": "running",
    "running": "running",
    "stopped": "running",
    "finished": "finished",
    # What it had reached counts.
    "stopped early": "finished",
    "failed": "failed",
}


class LocalSweep:
    """Runs of a search.

    Args:
        search: what is to be done.

    Attributes:
        folder: of the search, with a numbered folder for each run.
        state: what was tried; `sweep.json` in the folder holds the same.
        results: number of a run -> how it ended.

    Raises:
        ConfigError: the folder holds another search, or the settings of the first run are wrong.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.results: dict[int, JobResult] = {}
        self.folder = Path(search.run_dir)
        self._planned: dict[int, PlannedJob] = {}
        self._final: dict[int, Sequence[float]] = {}
        self._behind: set[int] = set()
        self._look_after = 0.0
        before = read_state(self.folder)
        runs = [] if before is None else before.runs
        first = runs[0] if runs else SweepRun(0, self._suggest([]) or {})
        # As many GPUs as the first takes, the others take too, unless it is they that are searched.
        self._like = self._plan(first)
        settings = comparable(search.file, search.seed, self._like.configs)
        if before is not None:
            check_comparable(before, settings, self.folder)
        self.state = SweepState(search.file.name, settings, runs)
        self._again = deque(run for run in runs if not run.ended)

    def run(self, jobs: LocalJobs) -> None:
        """Start, watch and end runs until there is nothing left to try, or a signal has stopped them.

        Args:
            jobs: that carry them out.

        Raises:
            ConfigError: a run for which there would never be room.
        """
        jobs.check(self._like.job)
        with JobProgress(self.search.count) as progress, jobs:
            self._skip_ended(progress)
            while self._fill(jobs, progress) or jobs.running:
                for outcome in jobs.wait(_LOOK_SECONDS):
                    self._take(outcome, progress)
                self._stop_hopeless(jobs, progress)
                progress.look(self._planned[job.number] for job in jobs.running)

    def scores(self) -> dict[int, float]:
        """Number of a finished run -> last value of the metric."""
        values = {run.number: self._reached(run) for run in self.state.runs if run.state == "finished"}
        return {number: reached[-1] for number, reached in values.items() if reached}

    def best(self) -> SweepRun | None:
        """The finished run with the best score; None where there is none."""
        scores = self.scores()
        choose = max if self.search.file.maximize else min
        return self.state.runs[choose(scores, key=scores.__getitem__)] if scores else None

    def _skip_ended(self, progress: JobProgress) -> None:
        for run in self.state.runs:
            if run.ended:
                planned = self._plan(run)
                progress.skipped(planned)
                self.results[run.number] = JobResult(planned, run.state, run.exit_code, run.seconds, planned.job.log)

    def _fill(self, jobs: LocalJobs, progress: JobProgress) -> bool:
        """Start runs while there is room; whether one was started."""
        started = False
        while jobs.has_room(self._like.job) and (run := self._next()) is not None:
            try:
                planned = self._plan(run)
                jobs.check(planned.job)
            except ConfigError as error:
                self._keep(run, "failed")
                progress.told(f"job {run.number} is left out: {error}")
                continue
            if not jobs.has_room(planned.job):
                self._again.appendleft(run)
                break
            self._keep(run, "running")
            jobs.start(planned.job)
            progress.started(planned)
            started = True
        return started

    def _next(self) -> SweepRun | None:
        """What to try next: what an earlier start has not ended, then something new."""
        runs = self.state.runs
        if any(map(self._is_reached, runs)):
            return None
        if self._again:
            return self._again.popleft()
        if self.search.count is not None and len(runs) >= self.search.count:
            return None
        if (values := self._suggest(self._trials())) is None:
            return None
        runs.append(SweepRun(len(runs), values))
        return runs[-1]

    def _take(self, outcome: JobOutcome, progress: JobProgress) -> None:
        run, planned = self.state.runs[outcome.job.number], self._planned[outcome.job.number]
        result = ended(planned, outcome.exit_code, outcome.seconds, outcome.log)
        if outcome.stopped and run.number in self._behind:
            result = replace(result, state="stopped early")
        run.exit_code, run.seconds = outcome.exit_code, run.seconds + outcome.seconds
        self.results[run.number] = result
        self._keep(run, result.state)
        progress.told(f"job {run.number}: {self._says(run.number)}")
        progress.ended(result)

    def _stop_hopeless(self, jobs: LocalJobs, progress: JobProgress) -> None:
        running = {job.number: job for job in jobs.running}
        began = time.monotonic()
        if not running or began < self._look_after or "early_terminate" not in self.search.file.definition:
            return
        for number in hopeless(self.search.file.definition, self._trials()):
            if number in running and number not in self._behind:
                self._behind.add(number)
                progress.told(f"job {number} falls behind with {self._says(number)}: it is asked to stop")
                jobs.stop(running[number])
        # Metrics of long runs take time to read: this process shall be idle most of its time.
        self._look_after = time.monotonic() + _IDLE * (time.monotonic() - began)

    def _is_reached(self, run: SweepRun) -> bool:
        reached = self._reached(run) if run.ended else ()
        return bool(reached) and self.search.file.is_reached(reached[-1])

    def _trials(self) -> list[Trial]:
        return [Trial(run.number, run.values, _SEEN_AS[run.state], self._reached(run)) for run in self.state.runs]

    def _reached(self, run: SweepRun) -> Sequence[float]:
        """Values of the metric so far."""
        if run.number in self._final:
            return self._final[run.number]
        planned = self._planned.get(run.number)
        values = () if planned is None else self.search.reached(planned)
        if run.ended:
            self._final[run.number] = values
        return values

    def _says(self, number: int) -> str:
        values = self._reached(self.state.runs[number])
        return f"{self.search.file.metric} = {values[-1]:.4g}" if values else f"no {self.search.file.metric}"

    def _suggest(self, trials: Sequence[Trial]) -> dict[str, Any] | None:
        return suggest(self.search.file.definition, trials, self.search.seed)

    def _plan(self, run: SweepRun) -> PlannedJob:
        if run.number not in self._planned:
            self._planned[run.number] = self.search.plan(run)
        return self._planned[run.number]

    def _keep(self, run: SweepRun, state: State) -> None:
        run.state = state
        self.state.write(self.folder)
