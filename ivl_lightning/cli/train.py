"""`python train.py`: compose every stage, run the chain, print the table, write the report."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.command import job_folder, sequel_configs, stage_configs, take_arguments
from ivl_lightning.launch.dry_run import print_dry_run, stand_ins, traces_aside


def main() -> None:
    """The command. A user's mistake ends with its message and exit code 1."""
    take_arguments()
    with traces_aside(sys.argv[1:]) as arguments:
        sys.argv[1:] = arguments
        _main()


@hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="train")
def _main(composed: DictConfig) -> None:
    try:
        run(composed)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def run(composed: DictConfig) -> None:
    """Run the stages of a composed configuration.

    Raises:
        ConfigError: a wrong setting.
        SystemExit: a stage failed; its process has said why.
    """
    if composed.dry_run:
        print_dry_run(stage_configs(composed, stand_ins(composed)))
        return
    # Imported late: --help, --cfg and wrong settings need neither torch nor matplotlib.
    from ivl_lightning.launch.chain import StageFailedError, run_chain

    configs, run_dir = stage_configs(composed), job_folder(composed.run_dir)
    # Stages that are picked are all that is wanted.
    sequels = sequel_configs(configs) if composed.stages is None else {}
    _write_command(run_dir)
    try:
        results = run_chain(configs)
        for folder, stages in sequels.items():
            results += [replace(result, stage=f"{folder}: {result.stage}") for result in run_chain(stages)]
    except StageFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        _report(run_dir)
        sys.exit(error.code)
    from ivl_lightning.reporting.table import print_stage_table

    print_stage_table(results)
    _report(run_dir)


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
