"""What a chain needs to start from, in the words that the chain and its dry run share."""

from __future__ import annotations

from collections.abc import Mapping

from ivl_lightning.checkpoints.run_folders import weights_folder
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig

HOW_TO_START = (
    "give model.path=FOLDER or init_from=RUN, or parts (model.vision_path and model.language_model_path) "
    "(or model.random_weights=true to train from nothing)"
)


def how_to_give_tower(known: str | None) -> str:
    """What to do where there is no vision tower.

    Args:
        known: recipe whose run gives it; None where nobody says.
    """
    which = f" (a run of recipe={known}, from whose stage 1.5 the published model has it)" if known else ""
    return f"give scaling.donor=RUN{which}, or model.vision_path=FOLDER"


def first_weights(configs: Mapping[str, RunConfig]) -> str | None:
    """Folder of the weights that a chain starts from; None where its first stage builds a network or joins parts.

    Args:
        configs: stage name -> its configuration, in order.

    Raises:
        ConfigError: it has nothing to start from.
    """
    name, config = next(iter(configs.items()))
    model = config.model
    if config.init_from is not None:
        return str(weights_folder(config.init_from))
    if not (model.path or model.language_model_path or model.random_weights):
        raise ConfigError(f"stage {name} has no weights to start from: {HOW_TO_START}")
    if model.language_model_path is not None and not any((model.path, model.vision_path, config.scaling.donor)):
        raise ConfigError(
            f"model.language_model_path={model.language_model_path} has no vision tower beside it: "
            f"{how_to_give_tower(config.recipe.donor)}"
        )
    return None
