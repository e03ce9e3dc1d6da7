"""The network: vision tower, projector and any AutoModel language model, through transformers' InternVL classes."""

from __future__ import annotations

import difflib
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

# Imported for its registration: `attn_implementation="ivl_packed"` is known from here on.
from ivl_lightning.models.attention import PACKED_ATTENTION
from ivl_lightning.models.parts import patch_size, text_config, tile_size, vision_tower
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
    side = int(tile_size(internvl) // patch_size(internvl) * config.downsample_ratio)
    internvl.image_seq_length = side * side
    return internvl


def _check_fields(where: str, given: dict[str, Any], known: PreTrainedConfig) -> None:
    accepted = known.to_dict()
    for key in given:
        if key not in accepted and not hasattr(known, key):
            close = difflib.get_close_matches(key, accepted, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise ValueError(f"{where}.{key} is not a field of {type(known).__name__}{hint}")


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> InternVLForConditionalGeneration:
    """A model with random weights (or those of `config.path`) whose vocabulary holds the tokenizer's.

    Raises:
        ValueError: unknown fields, a tokenizer without `<IMG_CONTEXT>`, or an unreadable `config.path`.
    """
    dtype = getattr(torch, config.dtype)
    if config.path is not None:
        model = load_model(config.path, dtype=dtype, attention=config.attention)
        check_shapes(model, config)
    else:
        model = _random_model(config, len(tokenizer), dtype)
    grow_vocabulary(model, len(tokenizer))
    model.config.image_token_id = model.model.config.image_token_id = image_token_id(tokenizer)
    return model


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


def load_model(path: str, **kwargs: Any) -> InternVLForConditionalGeneration:
    """Read a folder that transformers wrote (`config.json` and safetensors).

    Args:
        path: the folder.
        **kwargs: `dtype` (float32 by default), `attention` (packed by default), and what `from_pretrained` takes.

    Raises:
        ValueError: no such folder, no configuration, or one of another kind of model.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path={path}: there is no config.json; give a folder written by save_pretrained")
    found = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if found != InternVLConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {found!r}, needed is {InternVLConfig.model_type!r} "
            "(the layout transformers writes, names ending in -hf)"
        )
    return InternVLForConditionalGeneration.from_pretrained(
        folder,
        dtype=kwargs.pop("dtype", torch.float32),
        attn_implementation=_attention(kwargs.pop("attention", PACKED_ATTENTION)),
        use_safetensors=True,
        local_files_only=True,
        **kwargs,
    )


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
