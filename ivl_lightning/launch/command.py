"""What the commands that take `train.py`'s arguments do with them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import PREFERENCE_STAGE
from ivl_lightning.launch.agent_arguments import plain_arguments
from ivl_lightning.launch.compose import compose_stage, stage_names
from ivl_lightning.launch.overrides import check_keys, complete, literal, with_job_launcher


def take_arguments(*, starts_jobs: bool = False) -> None:
    """Complete and check `sys.argv` before Hydra sees it; a misspelt setting ends the command with its message.

    Args:
        starts_jobs: whether a multirun of this command runs its jobs as processes of their own.
    """
    recipes = [path.name.removesuffix(".yaml") for path in files("ivl_lightning.conf").joinpath("recipe").iterdir()]
    try:
        arguments = complete(plain_arguments(sys.argv[1:]), recipes)
        check_keys(arguments)
        if starts_jobs:
            arguments = with_job_launcher(arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sys.argv[1:] = arguments


def stage_configs(composed: DictConfig, extra: Sequence[str] = ()) -> dict[str, RunConfig]:
    """Stage name -> configuration, for each stage of the run that Hydra has composed.

    Args:
        composed: by Hydra.
        extra: overrides besides those of the command line.

    Raises:
        ConfigError: a wrong setting.
    """
    arguments = [*HydraConfig.get().overrides.task, *search_path(), *extra]
    # What is added may change the recipe that was composed without it.
    return _chain(composed, arguments, _job_folder(composed.run_dir), None if extra else composed.recipe)


def configs_of(overrides: Sequence[str], run_dir: str) -> dict[str, RunConfig]:
    """Stage name -> configuration, for each stage of a run with these overrides.

    Args:
        overrides: in the place of the command line's.
        run_dir: its run folder.

    Raises:
        ConfigError: a wrong setting.
    """
    arguments = [*overrides, *search_path()]
    composed = compose("train", overrides=[*arguments, f"run_dir={literal(run_dir)}"])
    return _chain(composed, arguments, run_dir, composed.recipe)


def sequel_configs(configs: Mapping[str, RunConfig], overrides: Sequence[str]) -> dict[str, dict[str, RunConfig]]:
    """The runs that follow a finished chain: folder below its run folder -> stage name -> configuration.

    They take over what the overrides say of seed, devices, logging and the like, but not which recipe, model or stages.
    Stages that are picked are all that is wanted: then there are none.

    Args:
        configs: of the chain.
        overrides: that it was composed with.

    Raises:
        ConfigError: a wrong setting.
    """
    first = next(iter(configs.values()))
    if first.stages is not None:
        return {}
    taken = list(filter(_is_taken_over, overrides))
    return {
        folder: configs_of([*taken, *own], f"{first.run_dir}/{folder}")
        for folder, own in first.recipe.sequels.items()
        if own
    }


def _chain(
    composed: DictConfig, arguments: Sequence[str], run_dir: str, recipe: DictConfig | None
) -> dict[str, RunConfig]:
    names = stage_names(composed.stages, _recipe_stages(composed))
    check_entry(composed.scaling.donor, composed.scaling.entry, names)
    return {
        name: compose_stage(name, [*arguments, *_donor(composed, name)], run_dir=run_dir, recipe=recipe)
        for name in names
    }


def _is_taken_over(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return key.partition(".")[0] not in ("recipe", "model", "stages", "init_from", "run_dir", "scaling", "stage_data")


def _donor(composed: DictConfig, name: str) -> list[str]:
    """The donor gives its tower to one stage; the others start from the weights of the one before."""
    return [] if name == composed.scaling.entry else ["scaling.donor=null"]


def check_entry(donor: str | None, entry: str, names: Sequence[str]) -> None:
    """A donor needs its stage of entry in the chain, with no stage before it that would train another tower.

    Raises:
        ConfigError: there is none, or there is such a stage.
    """
    if donor is None:
        return
    if entry not in names:
        raise ConfigError(
            f"scaling.donor={donor} gives its tower to stage scaling.entry={entry}, which is not among "
            f"stages={list(names)}: add it, or choose the other entry (mlp_warmup or vit_incremental)"
        )
    before = [name for name in names[: list(names).index(entry)] if name != "language_warmup"]
    if before:
        raise ConfigError(
            f"scaling.donor={donor} gives its tower to stage scaling.entry={entry}, but {', '.join(before)} would run "
            "before it for nothing: leave it out of stages"
        )


def _recipe_stages(composed: DictConfig) -> list[str]:
    """The recipe's stages without those on request; with a donor, the one of stages 1 and 1.5 that it enters at.

    The stage that learns from pairs is left out where it is not told which.
    """
    scaling, asked = composed.scaling, composed.recipe.stages
    on_request = composed.recipe.get("on_request", ())
    others = {"mlp_warmup", "vit_incremental"} - {scaling.entry} if scaling.donor is not None else set()
    wanted = {scaling.entry} if scaling.donor is not None else set()
    stages = {
        name: entry
        for name, entry in asked.items()
        if name in wanted or (name not in others and name not in on_request)
    }
    entry = stages.get(PREFERENCE_STAGE)
    told = entry is None or composed.stage_data.get(PREFERENCE_STAGE) or OmegaConf.select(entry, "data.meta")
    if not told and composed.stages is None:
        print(f"{PREFERENCE_STAGE} is left out: it needs stage_data.{PREFERENCE_STAGE}=FILE, a meta.json of pairs")
    return [name for name in stages if told or name != PREFERENCE_STAGE]


def _job_folder(run_dir: str) -> str:
    """The run folder of this job: the one given, or of a multirun a numbered folder below it."""
    settings = HydraConfig.get()
    return f"{run_dir}/{settings.job.num}" if settings.mode == RunMode.MULTIRUN else run_dir


def job_arguments(overrides: Sequence[str], run_dir: str) -> list[str]:
    """Arguments of `train.py` for a process that does what this command would do with these overrides.

    Args:
        overrides: of this command, or of a job of its multirun.
        run_dir: the same.
    """
    settings = HydraConfig.get()
    own_folders = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    flags = [argument for path in own_folders for argument in ("--config-dir", path)]
    # The launcher's settings stay: with them it may have set the trainer's.
    last = [f"run_dir={literal(run_dir)}", "launcher.name=none"]
    return [*flags, *overrides, *search_path(), *last]


def search_path() -> list[str]:
    """Config folders of the user's own, for compositions besides Hydra's."""
    return [override for override in HydraConfig.get().overrides.hydra if override.startswith("hydra.searchpath")]
