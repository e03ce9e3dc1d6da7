"""A multirun: each job of Hydra's sweeper is a process of its own, with its own run folder, log and settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.dry_run import print_dry_jobs
from ivl_lightning.launch.job_progress import JobProgress
from ivl_lightning.launch.jobs import LocalJobs
from ivl_lightning.launch.multirun_local import run_local
from ivl_lightning.launch.multirun_slurm import run_on_slurm
from ivl_lightning.launch.objective import Objective, choose_objective, read_scores
from ivl_lightning.launch.planned_jobs import JobResult, PlannedJob, finished_before, plan_jobs
from ivl_lightning.launch.ranks import Ranks
from ivl_lightning.launch.signals import JobsStoppedError

_LOCK_NAME = ".multirun.lock"


class Multirun:
    """The jobs of all batches of a sweeper, and how they ended.

    Args:
        ranks: that this command was started as.

    Attributes:
        folder: of the multirun, with a numbered folder for each job; None before the first batch.
        results: job number -> how far it came.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.folder: Path | None = None
        self.results: dict[int, JobResult] = {}

    def run_jobs(self, master: DictConfig, batch: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Run a batch; a sweeper gets the score of each job, or None where it has none.

        Args:
            master: composed without what is swept.
            batch: overrides of each job.
            first: number of the first.

        Raises:
            ConfigError: a wrong setting of any job; none is started then.
            JobsStoppedError: jobs were asked to stop.
        """
        self._check(master)
        if master.dry_run:
            print_dry_jobs(batch, first, master.run_dir)
            return [_returned(overrides, None) for overrides in batch]
        self.folder = Path(master.run_dir)
        planned = plan_jobs(HydraConfig.get().overrides.task, batch, first, str(self.folder))
        self.results |= {one.job.number: JobResult(one, "waiting") for one in planned}
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / _LOCK_NAME, blocking=False):
                self._run(planned)
        except Timeout:
            raise ConfigError(f"another multirun works in {self.folder}: wait, or use another run_dir") from None
        objective = self._objective()
        scores = [None if objective is None else objective.of(read_scores(one.configs)) for one in planned]
        return [_returned(overrides, score) for overrides, score in zip(batch, scores, strict=True)]

    def _objective(self) -> Objective | None:
        """What the jobs so far are compared by; None where no job has a score."""
        chains = [result.planned.configs for result in self.results.values()]
        return choose_objective(next(iter(chains[0].values())).objective, map(read_scores, chains))

    def _check(self, master: DictConfig) -> None:
        if self._ranks.starter != "alone":
            raise ConfigError(
                f"a multirun starts the processes of its jobs itself, but {self._ranks.starter} has started "
                f"{self._ranks.world_size} already: leave {self._ranks.starter} or -m out"
            )
        if master.replay is not None:
            raise ConfigError(f"replay={master.replay} shows a step of one run: leave -m out")

    def _run(self, planned: Sequence[PlannedJob]) -> None:
        left = [one for one in planned if one.seconds_before is None]
        launcher = planned[0].launcher
        if names := {one.launcher.name for one in planned} - {launcher.name}:
            raise ConfigError(f"launcher={launcher.name},{','.join(names)}: jobs of a multirun have one launcher")
        with JobProgress(len(planned)) as progress:
            for one in planned:
                if one.seconds_before is not None:
                    progress.skipped(one)
                    self._keep(finished_before(one))
            if launcher.name == "slurm":
                run_on_slurm(left, progress, self._keep)
                return
            jobs = LocalJobs(launcher.jobs if launcher.name == "local" else 1)
            run_local(left, jobs, progress, self._keep, follow=launcher.name == "none")
        if jobs.stopping:
            told = "jobs stopped on request; the same command goes on"
            raise JobsStoppedError(told, wants_requeue=jobs.wants_requeue)

    def _keep(self, result: JobResult) -> None:
        self.results[result.planned.job.number] = result


def _returned(overrides: Sequence[str], score: float | None) -> JobReturn:
    # Also of a job that has failed: Hydra's sweeper would end there, and others know what no score means.
    return JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=score)
