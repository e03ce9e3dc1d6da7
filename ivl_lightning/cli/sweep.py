"""`ivl-sweep`: search over settings on this machine; takes the arguments of `train.py`, which every run is given."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ivl_lightning.cli.multirun import conclude
from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.config.sweep import SweepConfig, check_sweep
from ivl_lightning.constants import PREEMPTED_EXIT_CODE
from ivl_lightning.launch.command import take_arguments
from ivl_lightning.launch.jobs import LocalJobs
from ivl_lightning.launch.overrides import parse

if TYPE_CHECKING:
    from ivl_lightning.launch.sweep import LocalSweep
    from ivl_lightning.launch.sweep_file import SweepFile
    from ivl_lightning.launch.sweep_runs import Search

_OWN = ("sweep", "count")
_LOCK_NAME = "sweep.lock"


def main() -> None:
    """The command: exit code 0, 1 for a mistake, which is named, or where a run failed, 75 stopped on request."""
    command = shlex.join(["ivl-sweep", *sys.argv[1:]])
    try:
        settings, rest = split(sys.argv[1:])
        file = None if settings is None else _read(settings)
        sys.argv[1:] = rest if file is None else run_arguments(file, rest)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    take_arguments()

    @hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="local_sweep")
    def task(composed: DictConfig) -> None:
        try:
            if settings is None or file is None:
                raise ConfigError("give sweep=NAME of conf/sweep, or sweep=FILE")
            run(composed, settings, file, command)
        except ConfigError as error:
            sys.exit(f"error: {error}")

    task()


def split(arguments: Sequence[str]) -> tuple[SweepConfig | None, list[str]]:
    """The command's own settings, None where there are none, and the arguments of `train.py`.

    Raises:
        ConfigError: a wrong one, or a multirun.
    """
    if flags := {"-m", "--multirun"} & set(arguments):
        raise ConfigError(f"{flags.pop()} is for train.py: what is searched stands in the sweep's file")
    own = [argument for argument in arguments if _key(argument) in _OWN]
    rest = [argument for argument in arguments if argument not in own]
    if not own:
        return None, rest
    settings = load(SweepConfig, {override.key_or_group: override.value() for override in parse(own)})
    check_sweep(settings)
    return settings, rest


def run_arguments(file: SweepFile, rest: Sequence[str]) -> list[str]:
    """The file's arguments in front of those of the command line, which count where both say something.

    Raises:
        ConfigError: the command line says what is searched, or what the file's metric says.
    """
    said = {_key(argument) for argument in rest}
    if searched := said & {*file.definition["parameters"], "objective.metric", "objective.goal"}:
        raise ConfigError(f"{', '.join(sorted(searched))}: the sweep's file says it, so leave it out of the command")
    return [*(argument for argument in file.arguments if _key(argument) not in said), *rest]


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _read(settings: SweepConfig) -> SweepFile:
    # Imported late: --help must not wait for what the search is made of.
    from ivl_lightning.launch.sweep_file import read_sweep_file

    return read_sweep_file(settings.sweep)


def run(composed: DictConfig, settings: SweepConfig, file: SweepFile, command: str) -> None:
    """Search, and say what came of it.

    Args:
        composed: what every run is given.
        settings: of this command.
        file: what is searched.
        command: as it was given.

    Raises:
        ConfigError: a wrong setting, or the folder holds another search or is searched already.
        SystemExit: a run failed, or the search was stopped on request.
    """
    if composed.launcher.name == "slurm":
        raise ConfigError("launcher=slurm: a search starts its runs on this machine; submit ivl-sweep itself")
    # Imported late, as the search is.
    from ivl_lightning.launch.sweep import LocalSweep

    search = _search(composed, settings, file)
    jobs = LocalJobs(composed.launcher.jobs if composed.launcher.name == "local" else 1)
    Path(search.run_dir).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(search.run_dir) / _LOCK_NAME, blocking=False):
            sweep = LocalSweep(search)
            sweep.run(jobs)
            _conclude(sweep, command)
    except Timeout:
        raise ConfigError(f"{search.run_dir} is searched by another ivl-sweep: wait, or use another run_dir") from None
    if jobs.stopping:
        print("stopped on request; the same command goes on", file=sys.stderr)
        sys.exit(PREEMPTED_EXIT_CODE)
    if any(run.state == "failed" for run in sweep.state.runs):
        sys.exit(1)


def _search(composed: DictConfig, settings: SweepConfig, file: SweepFile) -> Search:
    from ivl_lightning.launch.sweep_runs import Search
    from ivl_lightning.reporting.logged_metrics import read_metrics

    count = settings.count or file.run_cap
    if count is None and not file.is_grid:
        raise ConfigError(f"sweep={settings.sweep} would never end: give count=N, or run_cap in the file")
    overrides = HydraConfig.get().overrides.task
    common = tuple(override for override in overrides if _key(override) != "run_dir")
    return Search(
        file=file,
        overrides=common,
        run_dir=composed.run_dir if len(common) < len(overrides) else f"runs/sweep_{file.name}",
        seed=composed.seed,
        count=count,
        read=lambda folder, metric: [value for _, value in read_metrics(folder).series(metric)],
        has_wandb="wandb" in composed.logger,
    )


def _conclude(sweep: LocalSweep, command: str) -> None:
    """Print and write the summary, and say which run was best."""
    scores, metric = sweep.scores(), sweep.search.file.metric
    numbers = sorted(sweep.results)
    if numbers:
        reached = [{metric: scores[number]} if number in scores else {} for number in numbers]
        conclude(sweep.folder, command, [sweep.results[number] for number in numbers], reached)
    if (best := sweep.best()) is not None:
        print(f"best: job {best.number}, {metric} = {scores[best.number]:.4g}, in {sweep.folder / str(best.number)}")
        print(f"the same again: {sweep.search.command(best)}")


if __name__ == "__main__":
    main()
