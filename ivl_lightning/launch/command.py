"""What the commands that take `train.py`'s arguments do with them."""

from __future__ import annotations

import sys
from importlib.resources import files

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import PREFERENCE_STAGE
from ivl_lightning.launch.compose import compose_stage, stage_names
from ivl_lightning.launch.overrides import check_keys, complete


def take_arguments() -> None:
    """Complete and check `sys.argv` before Hydra sees it; a misspelt setting ends the command with its message."""
    recipes = [path.name.removesuffix(".yaml") for path in files("ivl_lightning.conf").joinpath("recipe").iterdir()]
    arguments = complete(sys.argv[1:], recipes)
    try:
        check_keys(arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sys.argv[1:] = arguments


def stage_configs(composed: DictConfig) -> dict[str, RunConfig]:
    """Stage name -> configuration, for each stage of the run that Hydra has composed.

    Raises:
        ConfigError: a wrong setting.
    """
    arguments = [*HydraConfig.get().overrides.task, *_search_path()]
    names = stage_names(composed.stages, _recipe_stages(composed))
    return {name: compose_stage(name, arguments, run_dir=job_folder(composed.run_dir)) for name in names}


def _recipe_stages(composed: DictConfig) -> list[str]:
    """The recipe's stages; the one that learns from pairs only where it is told which."""
    stages = composed.recipe.stages
    entry = stages.get(PREFERENCE_STAGE)
    told = entry is None or composed.stage_data.get(PREFERENCE_STAGE) or OmegaConf.select(entry, "data.meta")
    if not told and composed.stages is None:
        print(f"{PREFERENCE_STAGE} is left out: it needs stage_data.{PREFERENCE_STAGE}=FILE, a meta.json of pairs")
    return [name for name in stages if told or name != PREFERENCE_STAGE]


def job_folder(run_dir: str) -> str:
    """The run folder of this job: the one given, or of a multirun a numbered folder below it."""
    settings = HydraConfig.get()
    return f"{run_dir}/{settings.job.num}" if settings.mode == RunMode.MULTIRUN else run_dir


def _search_path() -> list[str]:
    """Config folders of the user's own, for the compositions of the single stages."""
    return [override for override in HydraConfig.get().overrides.hydra if override.startswith("hydra.searchpath")]
