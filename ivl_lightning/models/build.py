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
    PreTrainedTokenizerBase,
)
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.models.assembly import Sources, open_sources

# Imported for its registration: `attn_implementation="ivl_packed"` is known from here on.
from ivl_lightning.models.attention import PACKED_ATTENTION
from ivl_lightning.models.checkpoint import CONFIG_NAME, Checkpoint
from ivl_lightning.models.original_config import DEFAULT_TEMPLATE, keep_record
from ivl_lightning.models.parts import set_image_size, text_config, tile_size, vision_tower
from ivl_lightning.models.streaming import empty_model, fill
from ivl_lightning.models.tokenizer import image_token_id

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


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> InternVLForConditionalGeneration:
    """A model with random weights (or those of `config.path` and its kin) whose vocabulary holds the tokenizer's.

    Raises:
        ValueError: unknown fields, a tokenizer without `<IMG_CONTEXT>`, or weights that cannot be read.
    """
    dtype = getattr(torch, config.dtype)
    if has_weights(config):
        model = _filled(open_configured(config), dtype=dtype, attention=config.attention)
        check_shapes(model, config)
    else:
        model = _random_model(config, len(tokenizer), dtype)
    grow_vocabulary(model, len(tokenizer))
    keep_record(model.config, config.template)
    model.config.image_token_id = model.model.config.image_token_id = image_token_id(tokenizer)
    return model


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
        )
    )


def _wanted_tile(config: ModelConfig) -> int | None:
    side = config.vision.get("image_size")
    return side if isinstance(side, int) else None


def _random_model(config: ModelConfig, vocabulary: int, dtype: torch.dtype) -> InternVLForConditionalGeneration:
    internvl = build_config(config)
    if "vocab_size" not in config.language_model:
        text_config(internvl).vocab_size = vocabulary
    model = InternVLForConditionalGeneration._from_config(
        internvl, dtype=dtype, attn_implementation=_attention(config.attention)
    )
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
    return _filled(checkpoint, dtype=dtype, attention=attention, device_of=device_of)


def _filled(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    attention: str,
    device_of: Callable[[str], torch.device] = lambda _: torch.device("cpu"),
) -> InternVLForConditionalGeneration:
    described_by = str(checkpoint.folder / CONFIG_NAME)
    model = empty_model(checkpoint.config, dtype=dtype, attention=_attention(attention), described_by=described_by)
    fill(model, checkpoint.tensors, described_by=described_by, device_of=device_of)
    if checkpoint.generation is not None:
        model.generation_config = checkpoint.generation
    model.config._name_or_path = str(checkpoint.folder)
    return model.eval()


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


def grow_vocabulary(model: InternVLForConditionalGeneration, size: int) -> None:
    """Give the model `size` token rows at least; new output rows are the mean of the old ones.

    Source: official `internvl_chat_finetune.py`: new input rows keep the library's random start, new output rows the
    mean, so that a new token begins as likely as an average one.
    """
    old = text_config(model.config).vocab_size
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        head = model.lm_head.weight
        head[old:] = head[:old].mean(dim=0, keepdim=True)
    text_config(model.config).vocab_size = size


def enable_activation_checkpointing(model: InternVLForConditionalGeneration) -> None:
    """Recompute every block in backward, random numbers included; non-re-entrant, so that frozen inputs do no harm."""
    # The library renamed the switch between the versions this project supports.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": True})


def _attention(language: str) -> dict[str, str]:
    return {"text_config": language, "vision_config": VISION_ATTENTION}
