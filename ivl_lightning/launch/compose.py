"""The configuration of each stage: train.yaml + stage group + the recipe's entry + the command line, later wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.config.validate import validate
from ivl_lightning.constants import STAGES
from ivl_lightning.launch.overrides import flatten, literal

ALIASES = {"1": "mlp_warmup", "1.5": "vit_incremental", "2": "instruction_tuning", "mpo": "mixed_preference"}


def stage_names(requested: Sequence[object] | None, recipe_stages: Sequence[str]) -> list[str]:
    """Stages to run, in order; aliases 1, 1.5, 2 and mpo are accepted.

    A recipe's stages run in the order of the paper; those of the user's own come behind them, in the recipe's order.

    Raises:
        ConfigError: a stage named twice, or none at all.
    """
    if requested is None:
        own = [name for name in recipe_stages if name not in STAGES]
        requested = [*(name for name in STAGES if name in recipe_stages), *own]
    names = [ALIASES.get(str(name), str(name)) for name in requested]
    if not names:
        raise ConfigError("there is no stage to run: give stages=[...], or a recipe that lists some")
    if len(set(names)) < len(names):
        raise ConfigError(f"stages={names} names a stage twice")
    return names


def compose_stage(name: str, arguments: Sequence[str], *, run_dir: str, recipe: DictConfig | None = None) -> RunConfig:
    """Compose, check and resolve one stage's configuration.

    Args:
        name: of the stage.
        arguments: overrides of the command line.
        run_dir: of the run, decided once by the launching process.
        recipe: that these arguments give, where it is known.

    Raises:
        ConfigError: misspelt or missing settings, wrong types, contradictions.
    """
    fixed = [f"stage={literal(name)}", f"run_dir={literal(run_dir)}"]
    if recipe is None:
        recipe = _compose(name, [*arguments, *fixed]).recipe
    plain = OmegaConf.to_container(recipe, resolve=False)
    assert isinstance(plain, dict)
    entry = (plain.get("stages") or {}).get(name) or {}
    composed = _compose(name, [*flatten(entry), *arguments, *fixed])
    config = load(RunConfig, _with_stage_data(values_without_stages(composed), name))
    validate(config)
    return config


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("train", overrides=list(overrides))
    except MissingConfigException as error:
        if error.missing_cfg_file != f"stage/{name}":
            raise
        known = [*STAGES, *sorted(set(error.options or ()) - set(STAGES))]
        raise ConfigError(
            f"stages={[name]} are not known: use {', '.join(known)} (or {', '.join(ALIASES)}), or add a file "
            f"stage/{name}.yaml of your own (docs/extending.md)"
        ) from None


def values_without_stages(composed: DictConfig) -> dict[str, Any]:
    """As `plain_values`, but for the recipe's entries of its stages: they may refer to what only those stages have."""
    OmegaConf.update(composed, "recipe.stages", {}, merge=False, force_add=True)
    return plain_values(composed)


def plain_values(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration as a plain mapping, its references resolved.

    Raises:
        ConfigError: a setting without a value, or a reference to what there is not.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"these settings have no default and were not given: {', '.join(missing)}")
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"a reference in the configuration cannot be resolved: {error}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _with_stage_data(plain: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings of `stage_data.NAME` replace those of `data`; a plain string is a meta.json."""
    own = plain.get("stage_data", {}).get(name) or {}
    if isinstance(own, str):
        own = {"meta": own}
    return {**plain, "data": {**plain["data"], **own}}
