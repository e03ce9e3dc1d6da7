"""What the data need to know of a network before it is built: tokenizer, shapes, what trains, what work costs."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.utils import get_class
from transformers import AutoConfig, InternVLConfig, PreTrainedTokenizerBase

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import ModelConfig, Part, StageConfig
from ivl_lightning.models.build import build_config
from ivl_lightning.models.cost import training_cost
from ivl_lightning.models.tokenizer import add_special_tokens, load_tokenizer


def tokenizer_of(model: ModelConfig, init_from: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer with the nine special tokens: `model.tokenizer`, or the one beside the weights.

    Raises:
        ConfigError: neither is given.
    """
    source = model.tokenizer or init_from or model.path
    if source is None:
        raise ConfigError("model.tokenizer is missing: give a folder of tokenizer files, or model.path or init_from")
    tokenizer = load_tokenizer(source)
    add_special_tokens(tokenizer)
    return tokenizer


def shapes_of(model: ModelConfig, init_from: str | None = None) -> InternVLConfig:
    """Shapes of the network, from the config or from the folder it is read from.

    Raises:
        ConfigError: neither is given.
    """
    if model.language_model:
        return build_config(model)
    source = init_from or model.path
    if source is None:
        raise ConfigError(f"model={model.name} has neither shapes nor a path: give model.path")
    return AutoConfig.from_pretrained(source, local_files_only=True)


def trained_parts(stage: StageConfig) -> Sequence[Part]:
    """Parts that get gradients: the configured ones, or the stage's own choice."""
    return stage.trainable or get_class(stage._target_).default_trainable  # type: ignore[attr-defined]  # of a stage class


def cost_of(model: ModelConfig, stage: StageConfig, shapes: InternVLConfig) -> tuple[float, float, float]:
    """Modeled work per token, per squared document length and per tile in a stage."""
    return training_cost(shapes, trained_parts(stage), recompute=model.activation_checkpointing)
