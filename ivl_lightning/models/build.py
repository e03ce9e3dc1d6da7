"""The network: vision tower, projector and any AutoModel language model, through transformers' InternVL classes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedConfig,
)
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.models.assembly import Sources, open_sources

# Imported for its registration: `attn_implementation="ivl_packed"` is known from here on.
from ivl_lightning.models.attention import PACKED_ATTENTION
from ivl_lightning.models.checkpoint import CONFIG_NAME, Checkpoint
from ivl_lightning.models.original_config import DEFAULT_TEMPLATE, keep_record, set_order
from ivl_lightning.models.parts import set_image_size, text_config, tile_size, vision_tower
from ivl_lightning.models.projector import choose_projector
from ivl_lightning.models.streaming import empty_model, fill

VISION_ATTENTION = "sdpa"


def build_config(config: ModelConfig) -> InternVLConfig:
    """transformers' configuration of the shapes in `config`. Word embeddings are never tied, as in every release.

    Raises:
        ValueError: a field that transformers' configuration does not have, with the nearest that it has.
    """
    _check_fields("model.vision", config.vision, InternVLVisionConfig())
    language = dict(config.language_model)
    model_type = language.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.language_model.model_type is missing: name any AutoModel type, such as qwen2 or llama")
    _check_fields("model.language_model", language, AutoConfig.for_model(model_type))
    vision = InternVLVisionConfig(**config.vision)
    internvl = InternVLConfig(
        vision_config=vision,
        text_config=AutoConfig.for_model(model_type, **{**language, "tie_word_embeddings": False}),
        downsample_ratio=config.downsample_ratio,
        vision_feature_layer=-1 if config.vision_feature_layer is None else config.vision_feature_layer,
        tie_word_embeddings=False,
    )
    set_image_size(internvl, tile_size(internvl))
    return internvl


def _check_fields(where: str, given: dict[str, Any], known: PreTrainedConfig) -> None:
    accepted = known.to_dict()
    for key in given:
        if key not in accepted and not hasattr(known, key):
            close = difflib.get_close_matches(key, accepted, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise ValueError(f"{where}.{key} is not a field of {type(known).__name__}{hint}")


def has_weights(config: ModelConfig) -> bool:
    """Whether the network is read from somewhere, and not made of random numbers."""
    return bool(weight_sources(config))


def weight_sources(config: ModelConfig) -> list[str]:
    """Folders and files that the network is read from."""
    paths = (config.path, config.vision_path, config.projector_path, config.language_model_path)
    return [path for path in paths if path is not None]


def open_configured(config: ModelConfig) -> Checkpoint:
    """The configured weights, opened.

    Raises:
        CheckpointError: see `load_model`.
    """
    return open_sources(
        Sources(
            path=config.path,
            vision=config.vision_path,
            projector=config.projector_path,
            language_model=config.language_model_path,
            image_size=_wanted_tile(config),
            downsample_ratio=config.downsample_ratio,
            template=config.template or DEFAULT_TEMPLATE,
            ps_version=config.ps_version,
            vision_feature_layer=config.vision_feature_layer,
        )
    )


def _wanted_tile(config: ModelConfig) -> int | None:
    side = config.vision.get("image_size")
    return side if isinstance(side, int) else None


def random_model(config: ModelConfig, vocabulary: int) -> InternVLForConditionalGeneration:
    """A network of random weights in these shapes.

    Args:
        config: its shapes.
        vocabulary: token rows at least; as many, where the shapes do not say.

    Raises:
        ValueError: see `build_config`.
    """
    internvl = build_config(config)
    if config.ps_version is not None:
        keep_record(internvl, config.template)
        set_order(internvl, config.ps_version)
    known = "vocab_size" in config.language_model
    text_config(internvl).vocab_size = max(vocabulary, text_config(internvl).vocab_size if known else 0)
    model = InternVLForConditionalGeneration._from_config(
        internvl, dtype=getattr(torch, config.dtype), attn_implementation=_attention(config.attention)
    )
    choose_projector(model)
    if model.device.type != "meta":
        _break_symmetry(vision_tower(model), config.position_std)
    return model


def _break_symmetry(tower: InternVLVisionModel, std: float) -> None:
    """Random class token and positions, as in the original; the library leaves them 0, and patches then look alike."""
    embeddings = tower.embeddings
    nn.init.normal_(embeddings.cls_token, std=std)
    nn.init.normal_(embeddings.position_embeddings, std=std)


def load_model(
    path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = PACKED_ATTENTION,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    language_model: str | Path | None = None,
    image_size: int | None = None,
    downsample_ratio: float = 0.5,
    template: str = DEFAULT_TEMPLATE,
    device_of: Callable[[str], torch.device] = lambda _: torch.device("cpu"),
) -> InternVLForConditionalGeneration:
    """A model from a folder of either layout, from parts, or from a folder some of whose parts are replaced.

    Built without memory first, then filled tensor by tensor: beyond the model itself no more than one tensor is held.
    Code that lies beside the weights is never run.

    Args:
        path: folder of a checkpoint: the original's layout (`OpenGVLab/InternVL2_5-8B`) or transformers' (`-hf`).
        dtype: of the weights.
        attention: of the language model, by transformers' names.
        vision: takes the tower from another folder: an InternViT, or a whole checkpoint.
        projector: takes the projector from a file (a released `mlp1`), or a whole checkpoint. One that is given
            nowhere is new.
        language_model: takes the language model from another folder: one of its own, or a whole checkpoint.
        image_size: side of a tile in pixels; position embeddings are resized to it. None keeps what the files say.
        downsample_ratio: pixel unshuffle of a model from parts.
        template: chat template of a model from parts.
        device_of: where the parameter of a (native) name shall lie.

    Returns:
        In evaluation mode. `config.image_token_id` is that of the folder's tokenizer, if one lies there.

    Raises:
        ValueError: no such folder, another kind of model, and files that are missing, damaged, or do not fit the
            configuration; names file and tensor or field.
    """
    checkpoint = open_sources(
        Sources(
            path=path,
            vision=vision,
            projector=projector,
            language_model=language_model,
            image_size=image_size,
            downsample_ratio=downsample_ratio,
            template=template,
        )
    )
    model = empty_network(checkpoint, dtype=dtype, attention=attention)
    fill(model, checkpoint.tensors, described_by=described_by(checkpoint), device_of=device_of)
    return model


def empty_network(checkpoint: Checkpoint, *, dtype: torch.dtype, attention: str) -> InternVLForConditionalGeneration:
    """The network of a checkpoint without memory for its weights, in evaluation mode.

    Args:
        checkpoint: opened.
        dtype: of its parameters.
        attention: of the language model, by transformers' names.

    Raises:
        CheckpointError: no network can be built from its configuration.
    """
    model = empty_model(
        checkpoint.config, dtype=dtype, attention=_attention(attention), described_by=described_by(checkpoint)
    )
    if checkpoint.generation is not None:
        model.generation_config = checkpoint.generation
    model.config._name_or_path = str(checkpoint.folder)
    return model.eval()


def described_by(checkpoint: Checkpoint) -> str:
    """The file that describes a checkpoint, for messages."""
    return str(checkpoint.folder / CONFIG_NAME)


def check_shapes(model: InternVLForConditionalGeneration, config: ModelConfig) -> None:
    """Weights from elsewhere must be those of the model the config names.

    Raises:
        ValueError: the first shape that differs, with both values.
    """
    if not config.language_model:
        return
    wanted = build_config(config)
    for part in ("vision_config", "text_config"):
        here, there = getattr(wanted, part), getattr(model.config, part)
        for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(here, key) != getattr(there, key):
                raise ValueError(
                    f"the weights have {part}.{key}={getattr(there, key)}, but model={config.name} has "
                    f"{getattr(here, key)}: choose the model the weights belong to"
                )


def enable_activation_checkpointing(model: InternVLForConditionalGeneration) -> None:
    """Recompute every block in backward, random numbers included; non-re-entrant, so that frozen inputs do no harm."""
    # The library renamed the switch between the versions this project supports.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": True})


def _attention(language: str) -> dict[str, str]:
    return {"text_config": language, "vision_config": VISION_ATTENTION}
