"""The jobs of a multirun on this machine, one after the other or side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ivl_lightning.launch.job import Job
from ivl_lightning.launch.job_progress import JobProgress, LogFollower
from ivl_lightning.launch.jobs import LocalJobs
from ivl_lightning.launch.planned_jobs import JobResult, PlannedJob, ended

_LOOK_SECONDS = 0.5


def run_local(
    planned: Sequence[PlannedJob],
    jobs: LocalJobs,
    progress: JobProgress,
    keep: Callable[[JobResult], None],
    *,
    follow: bool,
) -> None:
    """Run jobs until all have ended, or have stopped on request; a failure of one is nothing to the others.

    Args:
        planned: the jobs, in the order of their start.
        jobs: that run them.
        progress: shows them.
        keep: takes the result of each that has ended.
        follow: show what a job writes, where one runs at a time.

    Raises:
        ConfigError: a job for which there would never be room; none is started then.
    """
    for one in planned:
        jobs.check(one.job)
    of_job = {one.job: one for one in planned}
    followers: dict[Job, LogFollower] = {}
    waiting = deque(planned)
    with jobs:
        is_told = False
        while (waiting and not jobs.stopping) or jobs.running:
            while waiting and jobs.has_room(waiting[0].job):
                one = waiting.popleft()
                if follow:
                    followers[one.job] = LogFollower(one.job.log)
                jobs.start(one.job)
                progress.started(one)
            outcomes = jobs.wait(_LOOK_SECONDS)
            if jobs.stopping and not is_told:
                is_told = True
                progress.told("running jobs save and stop; a second Ctrl-C kills them")
            for line in (line for follower in followers.values() for line in follower.new_lines()):
                progress.told(line)
            for outcome in outcomes:
                followers.pop(outcome.job, None)
                result = ended(of_job[outcome.job], outcome.exit_code, outcome.seconds, outcome.log)
                progress.ended(result)
                keep(result)
            progress.look(of_job[job] for job in jobs.running)
