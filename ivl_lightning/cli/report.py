"""`ivl-report run_dir=RUN`: the report of a run, finished, killed or still going, written once more."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.config.report import ReportConfig
from ivl_lightning.launch.compose import plain_values
from ivl_lightning.launch.overrides import forced

MISTAKE = 2


def main() -> None:
    """The command: exit code 0, or 2 with a message for a mistake."""
    try:
        sys.argv[1:] = forced(sys.argv[1:])
        _main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)


@hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="report")
def _main(composed: DictConfig) -> None:
    try:
        config = load(ReportConfig, plain_values(composed))
        for page in write_reports(Path(config.run_dir)):
            print(f"report: {page}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)


def write_reports(folder: Path) -> list[Path]:
    """Write the report of a run, or of each job of a multirun.

    Raises:
        ConfigError: the folder holds no run.
    """
    # Imported late: --help and wrong settings need nothing of it.
    from ivl_lightning.reporting.report import write_report
    from ivl_lightning.reporting.run_folder import job_folders, stage_folders

    runs = [folder] if stage_folders(folder) else job_folders(folder)
    if not runs:
        raise ConfigError(
            f"run_dir={folder} holds no run: give the folder whose subfolders are stages, such as "
            f"{folder}/instruction_tuning with its config.yaml"
        )
    return [write_report(str(run)) for run in runs]


if __name__ == "__main__":
    main()
