"""InternVL 2.5 1B made small, and pairs of its size, for the benchmarks of preference training."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.models.build import build_config
from ivl_lightning.structures import EncodedPair

SMALL, LARGE = 2_048, 151_674
"""Rows of the vocabulary."""


def shapes(vocabulary: int, *, width: int = 4, depth: int = 8, tile_size: int = 392) -> InternVLConfig:
    """InternVL 2.5 1B with its width and depth divided; tiles of 392 pixels are 196 tokens."""
    vision = {
        "hidden_size": 1024 // width,
        "intermediate_size": 4096 // width,
        "num_hidden_layers": 24 // depth,
        "num_attention_heads": 16 // width,
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
        "image_size": tile_size,
        "patch_size": 14,
    }
    language = {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": 896 // width,
        "intermediate_size": 4864 // width,
        "num_hidden_layers": 24 // depth,
        # One group of seven heads, as in each half of the 1B's layers.
        "num_attention_heads": 14 if width == 1 else 7,
        "num_key_value_heads": 2 if width == 1 else 1,
        "max_position_embeddings": 8192,
    }
    return build_config(ModelConfig(vision=vision, language_model=language))


def build(config: InternVLConfig, attention: str) -> InternVLForConditionalGeneration:
    """The same random weights whatever the attention; the last token of the vocabulary stands for the tiles.

    The head is scaled up: with the library's start all tokens would be about as likely, whatever comes before them.
    """
    torch.manual_seed(0)
    kinds = {"text_config": attention, "vision_config": "sdpa"}
    model = InternVLForConditionalGeneration._from_config(copy.deepcopy(config), attn_implementation=kinds)
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)
    model.config.image_token_id = model.model.config.image_token_id = config.text_config.vocab_size - 1
    return model


def random_pair(
    config: InternVLConfig, rng: np.random.Generator, tiles: int, text: int, chosen: int, rejected: int
) -> EncodedPair:
    slot, side = config.text_config.vocab_size - 1, config.vision_config.image_size[0]
    question, first, second = (rng.integers(1, slot, length).tolist() for length in (text, chosen, rejected))
    pixels = torch.from_numpy(rng.integers(0, 256, (tiles, 3, side, side), dtype=np.uint8))
    return EncodedPair([slot] * (tiles * config.image_seq_length) + question, first, first, second, second, pixels)


# -- steps ------------------------------------------------------------------------------------------------------------
