"""`python train.py`: compose every stage, run the chain, print the table, write the report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from ivl_lightning.cli.multirun import conclude
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import PREEMPTED_EXIT_CODE
from ivl_lightning.launch.command import job_arguments, sequel_configs, stage_configs, take_arguments
from ivl_lightning.launch.crew import Crew
from ivl_lightning.launch.dry_run import print_dry_run, stand_ins, traces_aside
from ivl_lightning.launch.meeting import LostRankError
from ivl_lightning.launch.multirun import Multirun
from ivl_lightning.launch.ranks import check_ranks, started_ranks
from ivl_lightning.launch.replay import write_replay
from ivl_lightning.launch.signals import JobsStoppedError, StopRequestedError
from ivl_lightning.launch.slurm import requeue, submit_command

if TYPE_CHECKING:
    from ivl_lightning.launch.chain import StageStoppedError


def main() -> None:
    """The command. A user's mistake ends with its message and exit code 1, a stop on request with 75."""
    crew = _crew()
    with crew.listening():
        if crew.ranks.rank > 0:
            _follow(crew)
            return
        with crew.leading():
            given = shlex.join(["python", "train.py", *sys.argv[1:]])
            take_arguments(starts_jobs=True)
            with traces_aside(sys.argv[1:]) as arguments:
                sys.argv[1:] = arguments
                _compose_and_run(crew, given)


def _crew() -> Crew:
    try:
        return Crew(started_ranks(os.environ))
    except ConfigError as error:
        # Every rank finds it, and one says so.
        sys.exit(f"error: {error}" if os.environ.get("SLURM_PROCID", "0") == "0" else 1)


def _follow(crew: Crew) -> None:
    try:
        sys.exit(crew.follow())
    except LostRankError as error:
        sys.exit(f"error: {error}")


class Command:
    """What Hydra calls: with the composed configuration of a run, or with the jobs of a multirun.

    Args:
        crew: processes of this command.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.multirun = Multirun(crew.ranks)

    def __call__(self, composed: DictConfig) -> None:
        """Run the stages of a run."""
        try:
            run(composed, self.crew)
        except ConfigError as error:
            sys.exit(f"error: {error}")
        except ValueError as error:
            # Imported late: wrong settings need no torch, and who raises it has imported it.
            from ivl_lightning.checkpoints.source import CheckpointError

            if not isinstance(error, CheckpointError):
                raise
            sys.exit(f"error: {error}")

    def run_jobs(self, master: DictConfig, batch: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Run jobs of a multirun."""
        try:
            return self.multirun.run_jobs(master, batch, first)
        except ConfigError as error:
            sys.exit(f"error: {error}")

    def conclude(self, given: str) -> bool:
        """Say what the jobs of a multirun have come to; whether none has failed.

        Args:
            given: the command line.
        """
        folder, results = self.multirun.folder, list(self.multirun.results.values())
        return folder is None or not results or conclude(folder, given, results)


def _compose_and_run(crew: Crew, given: str) -> None:
    command = Command(crew)
    try:
        hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="train")(command)()
    except (StopRequestedError, JobsStoppedError) as stop:
        command.conclude(given)
        _stop(stop, crew)
    if not command.conclude(given):
        sys.exit(1)


def run(composed: DictConfig, crew: Crew) -> None:
    """Run the stages of a composed configuration, or hand the command to a scheduler.

    Raises:
        ConfigError: a wrong setting.
        SystemExit: a stage failed, and its process has said why; or it stopped on request.
    """
    if composed.dry_run:
        print_dry_run(stage_configs(composed, stand_ins(composed)))
        return
    overrides = HydraConfig.get().overrides.task
    configs, run_dir = stage_configs(composed), composed.run_dir
    sequels = sequel_configs(configs, overrides)
    chains = [configs, *sequels.values()]
    if composed.launcher.name == "slurm":
        launcher = next(iter(configs.values())).launcher
        submit_command(launcher, job_arguments(overrides, run_dir), crew.ranks, run_dir)
        return
    for chain in chains:
        check_ranks(crew.ranks, chain)
    if composed.replay is not None:
        sys.exit(crew.run(write_replay(configs)))
    _write_command(run_dir)
    _run_chains(configs, sequels, run_dir, crew)


def _run_chains(
    configs: Mapping[str, RunConfig], sequels: Mapping[str, Mapping[str, RunConfig]], run_dir: str, crew: Crew
) -> None:
    # Imported late: --help, --cfg and wrong settings need neither torch nor matplotlib.
    from ivl_lightning.launch.chain import StageFailedError, StageStoppedError, run_chain

    try:
        results = run_chain(configs, crew)
        for folder, stages in sequels.items():
            results += [replace(result, stage=f"{folder}: {result.stage}") for result in run_chain(stages, crew)]
    except StageFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        _report(run_dir)
        sys.exit(error.code)
    except StageStoppedError as stop:
        _report(run_dir)
        _stop(stop, crew)
    from ivl_lightning.reporting.table import print_stage_table

    print_stage_table(results)
    _report(run_dir)


def _stop(stop: StopRequestedError | StageStoppedError | JobsStoppedError, crew: Crew) -> NoReturn:
    print(stop, file=sys.stderr)
    asked = stop.wants_requeue if isinstance(stop, JobsStoppedError) else crew.wants_requeue
    if asked and (told := requeue(os.environ)):
        print(told, file=sys.stderr)
    sys.exit(PREEMPTED_EXIT_CODE)


def _report(run_dir: str) -> None:
    """Written after a failure too: it shows how far the chain came."""
    from ivl_lightning.reporting.report import write_report

    print(f"report: {write_report(run_dir)}")


def _write_command(run_dir: str) -> None:
    """Keep the command beside its results, for the report."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "train.py", *HydraConfig.get().overrides.task])
    (Path(run_dir) / "command.txt").write_text(command + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
