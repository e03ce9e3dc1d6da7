"""A tiny InternVL, 28 samples of the made-up stream for it, and the ways to batch them, for `bench_step.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from streams import TOKENS_PER_IMAGE, TOKENS_PER_TILE, make_stream
from torch import Tensor
from transformers import InternVLConfig

from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.collate import pack_samples
from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.data.tiling import normalize_tiles
from ivl_lightning.models.build import build_config
from ivl_lightning.structures import Encoded, PackedBatch, PlannedPack

VOCABULARY, IMAGE_TOKEN = 2000, 1999
TILE_SIZE, TILE_TOKENS = 224, 64
MAX_TOKENS, MAX_TILES = 4096, 64
NUM_SAMPLES, STREAM_LENGTH, SEED = 28, 3000, 7
SUPERVISED = 0.6


def shapes() -> InternVLConfig:
    """ViT of 4 layers and 128 channels, Qwen2 of 4 layers and 256 channels, tiles of 64 tokens."""
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
        "image_size": TILE_SIZE,
        "patch_size": 14,
    }
    language = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
    }
    return build_config(ModelConfig(vision=vision, language_model=language))


def make_samples() -> list[Encoded]:
    """The first of the stream that fit a pack, recounted at 64 tokens a tile; tiles first, then text.

    The last 60 % of a sample's text are supervised. Text and pixels are random.
    """
    stream, rng = make_stream(STREAM_LENGTH, SEED), np.random.default_rng(0)
    samples: list[Encoded] = []
    for tokens, tiles, images in zip(*(values.tolist() for values in columns(stream)), strict=True):
        text = tokens - TOKENS_PER_TILE * tiles - TOKENS_PER_IMAGE * images
        marks = TOKENS_PER_IMAGE * images
        if TILE_TOKENS * tiles + marks + text <= MAX_TOKENS and len(samples) < NUM_SAMPLES:
            ids = [IMAGE_TOKEN] * (TILE_TOKENS * tiles) + rng.integers(1, IMAGE_TOKEN, marks + text).tolist()
            kept = len(ids) - int(SUPERVISED * text)
            samples.append(Encoded(ids, [IGNORE_INDEX] * kept + ids[kept:], random_tiles(rng, tiles)))
    return samples


def columns(stream):
    return stream.tokens, stream.tiles, stream.images


def random_tiles(rng: np.random.Generator, tiles: int) -> Tensor | None:
    pixels = rng.integers(0, 256, (tiles, 3, TILE_SIZE, TILE_SIZE), dtype=np.uint8)
    return torch.from_numpy(pixels) if tiles else None


def num_tiles(sample: Encoded) -> int:
    return 0 if sample.pixel_values is None else len(sample.pixel_values)


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """What a trainer without packing feeds: rows padded on the right, normalized pixels, a mask.

    Attributes:
        input_ids, labels, attention_mask: `[B, L]`.
        pixel_values: float32 `[N, 3, S, S]`, or None.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None


def packed(samples: Sequence[Encoded]) -> Iterator[PackedBatch]:
    """Packs of our planner; every supervised token weighs 1."""
    tokens, tiles = [len(sample.input_ids) for sample in samples], [num_tiles(sample) for sample in samples]
    for pack in PackPlanner(MAX_TOKENS, MAX_TILES).plan(tokens, tiles):
        yield pack_samples(
            [samples[number] for number in pack.samples],
            planned=PlannedPack(pack, 0, 0, 0, 1, 1, 1.0, 0.0),
            reduction="token",
            dataset_ids=[0] * len(pack.samples),
            sample_ids=[str(number) for number in pack.samples],
            filler_id=0,
            tile_size=TILE_SIZE,
        )


def padded(samples: Sequence[Encoded], size: int) -> Iterator[PaddedBatch]:
    """Batches of `size` samples in the given order, each padded to its longest."""
    for start in range(0, len(samples), size):
        members = samples[start : start + size]
        longest = max(len(sample.input_ids) for sample in members)
        gaps = [longest - len(sample.input_ids) for sample in members]
        pixels = [sample.pixel_values for sample in members if sample.pixel_values is not None]
        yield PaddedBatch(
            torch.tensor([sample.input_ids + [0] * gap for sample, gap in zip(members, gaps, strict=True)]),
            torch.tensor([sample.labels + [IGNORE_INDEX] * gap for sample, gap in zip(members, gaps, strict=True)]),
            torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps]),
            normalize_tiles(torch.cat(pixels)) if pixels else None,
        )
