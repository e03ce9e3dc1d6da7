"""`ivl-index`: measure the data of a run beforehand; takes the arguments of `train.py`."""

from __future__ import annotations

import sys
from importlib.resources import files

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.overrides import check_keys, complete

OVER_LIMIT = 1


def main() -> None:
    """The command: exit code 0, or 1 for a mistake, which is named, and where too many rows are rejected."""
    recipes = [path.name.removesuffix(".yaml") for path in files("ivl_lightning.conf").joinpath("recipe").iterdir()]
    arguments = complete(sys.argv[1:], recipes)
    try:
        check_keys(arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sys.argv[1:] = arguments
    _main()


@hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="train")
def _main(composed: DictConfig) -> None:
    # Imported late: --help and wrong settings need no torch.
    from ivl_lightning.launch.compose import compose_stage, stage_names
    from ivl_lightning.launch.measure import measure_stages

    try:
        names = stage_names(composed.stages, list(composed.recipe.stages))
        arguments = HydraConfig.get().overrides.task
        configs = {name: compose_stage(name, arguments, run_dir=composed.run_dir) for name in names}
        within_limit = measure_stages(configs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not within_limit:
        sys.exit(OVER_LIMIT)


if __name__ == "__main__":
    main()
