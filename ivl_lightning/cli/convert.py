"""`ivl-convert source=DIR target=DIR layout=hf`: a checkpoint of either layout into one of either, proven equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from ivl_lightning.cli.conversion import finish, start
from ivl_lightning.config.convert import ConvertConfig

if TYPE_CHECKING:
    from ivl_lightning.conversion.parity import ParityReport


def main() -> None:
    """The command."""
    start(_main)


@hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="convert")
def _main(composed: DictConfig) -> None:
    finish(ConvertConfig, composed, convert)


def convert(config: ConvertConfig) -> ParityReport:
    """Read the source and write the target.

    Raises:
        ValueError: the source cannot be read, or the target not be written from it.
        DiskError: no space.
    """
    from ivl_lightning.conversion.write import write_checkpoint
    from ivl_lightning.models.checkpoint import open_checkpoint

    return write_checkpoint(open_checkpoint(config.source), config)


if __name__ == "__main__":
    main()
