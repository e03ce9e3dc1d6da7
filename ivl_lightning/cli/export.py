"""`ivl-export run=RUN target=DIR`: what a run has trained, as a folder for those who serve it, proven equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from ivl_lightning.cli.conversion import finish, start
from ivl_lightning.config.convert import ExportConfig

if TYPE_CHECKING:
    from ivl_lightning.conversion.parity import ParityReport


def main() -> None:
    """The command."""
    start(_main)


@hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="export")
def _main(composed: DictConfig) -> None:
    finish(ExportConfig, composed, export)


def export(config: ExportConfig) -> ParityReport:
    """Read the run and write the target.

    Raises:
        ValueError: there is no such run, stage or checkpoint, or the target cannot be written from it.
        DiskError: no space.
    """
    from ivl_lightning.conversion.beside import write_beside
    from ivl_lightning.conversion.write import write_checkpoint
    from ivl_lightning.launch.adapter import ADAPTER_FOLDER
    from ivl_lightning.launch.exported import open_run, stage_folder

    if config.adapter == "beside":
        return write_beside(stage_folder(config) / ADAPTER_FOLDER, config)
    return write_checkpoint(open_run(config), config)


if __name__ == "__main__":
    main()
