"""`ivl-index`: measure the data of a run beforehand; takes the arguments of `train.py`."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from ivl_lightning.launch.command import stage_configs, take_arguments

OVER_LIMIT = 1


def main() -> None:
    """The command: exit code 0, or 1 for a mistake, which is named, and where too many rows are rejected."""
    take_arguments()
    _main()


@hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="train")
def _main(composed: DictConfig) -> None:
    try:
        configs = stage_configs(composed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    # Imported late: --help and wrong settings need no torch.
    from ivl_lightning.data.storage import MachineError
    from ivl_lightning.launch.measure import measure_stages

    try:
        within_limit = measure_stages(configs)
    except (ValueError, MachineError) as error:
        sys.exit(f"error: {error}")
    if not within_limit:
        sys.exit(OVER_LIMIT)


if __name__ == "__main__":
    main()
