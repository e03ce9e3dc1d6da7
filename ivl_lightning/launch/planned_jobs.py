"""Jobs of a multirun before they start, with their settings checked; and how they ended."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import LauncherConfig, RunConfig, TrainerConfig
from ivl_lightning.constants import PREEMPTED_EXIT_CODE
from ivl_lightning.launch.command import configs_of, job_arguments, sequel_configs
from ivl_lightning.launch.finished import finished_stage
from ivl_lightning.launch.gpus import visible_gpus
from ivl_lightning.launch.job import BEGIN, Job, log_lines
from ivl_lightning.launch.objective import objective_stage
from ivl_lightning.launch.overrides import parse
from ivl_lightning.launch.ranks import Ranks, check_ranks
from ivl_lightning.launch.signals import shell_code
from ivl_lightning.launch.start import first_weights

State = Literal["waiting", "running", "finished", "failed", "stopped", "stopped early"]
_SHOWN_LINES = 6
# As a rank's process or `train.py` itself begins what is meant for people.
_ERRORS = ("error: ", "error on rank ")
_LAST_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job and what it will train.

    Attributes:
        job: its command.
        chains: stage name -> configuration, of its run and of those that follow it.
        seconds_before: wall time of its stages, where all are finished already; else None.
    """

    job: Job
    chains: tuple[Mapping[str, RunConfig], ...]
    seconds_before: float | None = None

    @property
    def configs(self) -> Mapping[str, RunConfig]:
        """Stage name -> configuration, of its run."""
        return self.chains[0]

    @property
    def launcher(self) -> LauncherConfig:
        """Where it shall run."""
        return next(iter(self.configs.values())).launcher

    @property
    def name(self) -> str:
        """For people: its number, and what sets it apart."""
        return " ".join(("job", str(self.job.number), *self.job.overrides))


@dataclass(frozen=True, slots=True)
class JobResult:
    """How far a job came.

    Attributes:
        planned: the job.
        state: `waiting` for its start, `running` where nobody waits for it any more, `stopped` on request,
            `stopped early` by a search, for falling behind.
        exit_code: 0 if it has finished; None where it has not ended or nobody knows.
        seconds: wall time of the last try; NaN where nobody knows.
        log: where it wrote.
    """

    planned: PlannedJob
    state: State
    exit_code: int | None = None
    seconds: float = math.nan
    log: Path | None = None

    def what_failed(self) -> str:
        """The first error of the last try in its log, from which others follow, or else the last lines of the log."""
        lines = _last_lines(self.log)
        begins = [place for place, line in enumerate(lines) if line.startswith(BEGIN)]
        lines = lines[begins[-1] + 1 :] if begins else lines
        errors = [place for place, line in enumerate(lines) if line.startswith(_ERRORS)]
        shown = lines[errors[0] :][:_SHOWN_LINES] if errors else lines[-_SHOWN_LINES:]
        return "\n".join(shown)


def finished_before(planned: PlannedJob) -> JobResult:
    """The result of a job that has nothing left to do."""
    assert planned.seconds_before is not None
    return JobResult(planned, "finished", 0, planned.seconds_before)


def ended(planned: PlannedJob, exit_code: int, seconds: float, log: Path) -> JobResult:
    """The result of a job whose process has ended; a negative code is that of the signal that killed it."""
    states: dict[int, State] = {0: "finished", PREEMPTED_EXIT_CODE: "stopped"}
    return JobResult(planned, states.get(exit_code, "failed"), shell_code(exit_code), seconds, log)


def plan_jobs(task: Sequence[str], batch: Sequence[Sequence[str]], first: int, run_dir: str) -> list[PlannedJob]:
    """Compose and check every job before any starts.

    Args:
        task: overrides of the command, with what is swept.
        batch: overrides of each job.
        first: number of the first.
        run_dir: of the multirun; each job has a numbered folder below it.

    Raises:
        ConfigError: lists the faults of all jobs.
    """
    # Of a key that is given twice the last counts.
    swept = {override.get_key_element(): override.is_sweep_override() for override in parse(task)}
    planned, faults = [], []
    for number, overrides in enumerate(batch, start=first):
        own = tuple(override for override in overrides if swept.get(override.partition("=")[0], True))
        try:
            planned.append(_plan(overrides, own, number, f"{run_dir}/{number}"))
        except ConfigError as error:
            faults.append(f"job {number} ({' '.join(own)}): {error}")
    if faults:
        raise ConfigError("\n".join(faults))
    return planned


def _plan(overrides: Sequence[str], own: tuple[str, ...], number: int, run_dir: str) -> PlannedJob:
    configs = configs_of(overrides, run_dir)
    chains = (configs, *sequel_configs(configs, overrides).values())
    objective_stage(configs)
    first_weights(configs)
    trainers = [config.trainer for chain in chains for config in chain.values()]
    job = Job(
        number=number,
        overrides=own,
        arguments=tuple(job_arguments(overrides, run_dir)),
        run_dir=run_dir,
        devices=_gpus(trainers),
        processes=max(trainer.devices for trainer in trainers),
    )
    planned = PlannedJob(job, chains, stage_seconds(chains))
    if planned.launcher.name != "slurm":
        for chain in chains:
            check_ranks(Ranks(), chain)
    return planned


def stage_seconds(chains: Iterable[Mapping[str, RunConfig]]) -> float | None:
    """Wall time of all stages; None where one is not finished.

    Raises:
        ConfigError: one was finished with other settings.
    """
    stages = [finished_stage(name, config) for chain in chains for name, config in chain.items()]
    return None if None in stages else sum(stage.seconds for stage in stages if stage is not None)


def _gpus(trainers: Iterable[TrainerConfig]) -> int:
    """The most that one of its stages takes."""
    there = bool(visible_gpus(os.environ))
    wanted = {"cpu": False, "cuda": True, "auto": there}
    return max(trainer.devices if wanted[trainer.accelerator] else 0 for trainer in trainers)


def _last_lines(log: Path | None) -> list[str]:
    if log is None or not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LAST_BYTES))
        return [line for line in log_lines(file.read()) if line]
