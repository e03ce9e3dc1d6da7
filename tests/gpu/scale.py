"""Network and packs of the GPU check, in two sizes: of InternVL 2.5 1B, and one that a CPU does in no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.collate import pack_samples
from ivl_lightning.data.collate_pairs import pack_pairs
from ivl_lightning.models.build import build_config
from ivl_lightning.structures import Encoded, EncodedPair, Pack, PackedBatch, PlannedPack, PreferenceBatch


@dataclass(frozen=True, slots=True)
class Scale:
    """Shapes and lengths.

    Attributes:
        vision, language: shapes of the network.
        tiles: of each document of the pack.
        text: text tokens of each document; six in ten are supervised.
        vocabulary, hidden, rows, supervised: of the head by itself.
        warm_up, steps: that are taken, and that are measured.
    """

    vision: dict[str, Any]
    language: dict[str, Any]
    tiles: tuple[int, ...]
    text: int
    vocabulary: int
    hidden: int
    rows: int
    supervised: int
    warm_up: int
    steps: int

    def config(self) -> InternVLConfig:
        return build_config(ModelConfig(vision=self.vision, language_model=self.language))


ONE_BILLION = Scale(
    vision={
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
        "image_size": 448,
        "patch_size": 14,
    },
    language={
        "model_type": "qwen2",
        "vocab_size": 151_674,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "max_position_embeddings": 32_768,
    },
    # 48 tiles and 16 x 256 tokens of text: 16,384 tokens, the caps of the recipes.
    tiles=(13, 10, 9, 7, 5, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    text=256,
    vocabulary=151_674,
    hidden=896,
    rows=16_384,
    supervised=2_448,
    warm_up=3,
    steps=6,
)
REHEARSAL = Scale(
    vision={**ONE_BILLION.vision, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    | {"intermediate_size": 128, "image_size": 56},
    language={**ONE_BILLION.language, "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256},
    tiles=(3, 1, 0, 0),
    text=24,
    vocabulary=1_000,
    hidden=32,
    rows=64,
    supervised=10,
    warm_up=1,
    steps=1,
)


def network(config: InternVLConfig, attention: str, device: torch.device) -> InternVLForConditionalGeneration:
    """Random weights, the same for each attention; the last word of the vocabulary stands for tiles."""
    torch.manual_seed(0)
    kinds = {"text_config": attention, "vision_config": "sdpa"}
    with device:
        model = InternVLForConditionalGeneration._from_config(config, attn_implementation=kinds)
    slot = config.text_config.vocab_size - 1
    model.config.image_token_id = model.model.config.image_token_id = slot
    return model.train()


def _random_ids(config: InternVLConfig, length: int) -> list[int]:
    return torch.randint(1, config.text_config.vocab_size - 1, (length,)).tolist()


def _pictures(config: InternVLConfig, tiles: int) -> tuple[list[int], Tensor | None]:
    side = config.vision_config.image_size[0]
    slots = [config.text_config.vocab_size - 1] * (tiles * config.image_seq_length)
    return slots, torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8) if tiles else None


def packed(config: InternVLConfig, tiles: Sequence[int], text: int) -> PackedBatch:
    """One pack; a document's tiles come first, and the last six tenths of its text are supervised."""
    torch.manual_seed(1)
    documents = []
    for count in tiles:
        slots, pixels = _pictures(config, count)
        ids = slots + _random_ids(config, text)
        kept = len(ids) - int(0.6 * text)
        documents.append(Encoded(ids, [IGNORE_INDEX] * kept + ids[kept:], pixels))
    return pack_samples(
        documents,
        planned=_planned(len(documents)),
        reduction="square",
        dataset_ids=[0] * len(documents),
        sample_ids=[f"document {number}" for number in range(len(documents))],
        filler_id=0,
        tile_size=config.vision_config.image_size[0],
    )


def pairs(config: InternVLConfig, tiles: Sequence[int], text: int) -> PreferenceBatch:
    """One pack of pairs; answers are of a half and of a third of the text's length."""
    torch.manual_seed(2)
    found = []
    for count in tiles:
        slots, pixels = _pictures(config, count)
        chosen, rejected = _random_ids(config, text // 2), _random_ids(config, text // 3)
        prompt = slots + _random_ids(config, text)
        found.append(EncodedPair(prompt, chosen, chosen, rejected, rejected, pixels))
    return pack_pairs(
        found,
        planned=_planned(len(found)),
        dataset_ids=[0] * len(found),
        sample_ids=[f"pair {number}" for number in range(len(found))],
        sample_rows=list(range(len(found))),
        reference_logps=[(0.0, 0.0)] * len(found),
        filler_id=0,
        tile_size=config.vision_config.image_size[0],
    )


def _planned(samples: int) -> PlannedPack:
    return PlannedPack(Pack(tuple(range(samples)), 0, 0), 0, 0, 0, 1, 1, 1.0, 0.0, step_samples=samples)
