"""What the data need to know of a network before it is built: tokenizer, shapes, what trains, what work costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hydra.utils import get_class
from transformers import InternVLConfig, PreTrainedTokenizerBase

from ivl_lightning.config import lora as lora_rules
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import LoraSettings, ModelConfig, Part, StageConfig
from ivl_lightning.data.templates import template_of
from ivl_lightning.models.build import build_config, has_weights, open_configured
from ivl_lightning.models.checkpoint import read_config, tokenizer_folder
from ivl_lightning.models.cost import training_cost
from ivl_lightning.models.tokenizer import add_special_tokens, load_tokenizer


def tokenizer_of(model: ModelConfig, init_from: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer with the nine special tokens: `model.tokenizer`, or the one beside the weights.

    Raises:
        ConfigError: neither is given.
    """
    source = model.tokenizer or init_from or model.path or model.language_model_path
    if source is None:
        raise ConfigError("model.tokenizer is missing: give a folder of tokenizer files, or model.path or init_from")
    tokenizer = load_tokenizer(tokenizer_folder(source))
    add_special_tokens(tokenizer)
    return tokenizer


def chosen_template(model: ModelConfig, init_from: str | None = None) -> str:
    """The chat template: the one that is asked for, else the checkpoint's own, else `internvl2_5`.

    Raises:
        ValueError: it is not known, or the checkpoint's configuration cannot be read.
    """
    source = init_from or model.path
    config = None if model.template is not None or source is None else read_config(source)
    return template_of(model.template, config)


def with_template(model: ModelConfig, init_from: str | None = None) -> ModelConfig:
    """The settings with the chat template named, see `chosen_template`."""
    return replace(model, template=chosen_template(model, init_from))


def shapes_of(model: ModelConfig, init_from: str | None = None) -> InternVLConfig:
    """Shapes of the network, from the config or from the folder it is read from.

    Raises:
        ConfigError: neither is given.
    """
    if model.language_model:
        return build_config(model)
    source = init_from or model.path
    if source is not None and (init_from is not None or not (model.vision_path or model.language_model_path)):
        return read_config(source)
    if not has_weights(model):
        raise ConfigError(f"model={model.name} has neither shapes nor a path: give model.path")
    return open_configured(model).config


def trained_parts(stage: StageConfig, lora: LoraSettings) -> Sequence[Part]:
    """Parts that get gradients: the configured ones, those with adapters, or the stage's own choice."""
    default = get_class(stage._target_).default_trainable  # type: ignore[attr-defined]  # of a stage class
    return lora_rules.trained_parts(stage.trainable, lora, default)


def cost_of(
    model: ModelConfig, stage: StageConfig, shapes: InternVLConfig, lora: LoraSettings | None = None
) -> tuple[float, float, float]:
    """Modeled work per token, per squared document length and per tile in a stage."""
    lora = lora or LoraSettings()
    return training_cost(
        shapes, trained_parts(stage, lora), adapted=lora.parts, recompute=model.activation_checkpointing
    )
