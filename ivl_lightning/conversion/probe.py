"""The fixed inputs on which a checkpoint and its copy are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import InternVLConfig, PreTrainedTokenizerBase

from ivl_lightning.constants import IMAGE_END_TOKEN, IMAGE_START_TOKEN
from ivl_lightning.data.tiling import normalize_tiles
from ivl_lightning.models.parts import tile_size
from ivl_lightning.models.tokenizer import text_ids

TEXTS = (
    "<|im_start|>user\nWhat is shown in Image-1? Answer in 3 words.<|im_end|>\n<|im_start|>assistant\n",
    '  Two blanks, a tab\tand\r\nlines\n\n; naïve façade — 3.14e-10 %, {"json": [null]} </s>',
    "图中有什么？这是一只猫。 日本語 한국어 العربية 🙂👩‍🚀",
    "<ref>the dog</ref><box>[[10, 20, 300, 999]]</box> <quad>1</quad> <img><IMG_CONTEXT></img>",
)
"""Texts whose ids must be those of the source: turns, blanks, numbers, scripts, and every special token."""

_QUESTION = "What is shown? 图中有什么？"
_SEED = 20241206


@dataclass(frozen=True, slots=True)
class Probe:
    """One document.

    Attributes:
        name: shown in the report.
        input_ids: `[L]`.
        pixel_values: normalized tiles `[N, 3, S, S]`, or None.
        image_token_id: of the tokens whose embeddings the tiles' features replace.
    """

    name: str
    input_ids: Tensor
    pixel_values: Tensor | None
    image_token_id: int


def probes(config: InternVLConfig, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Probe, Probe]:
    """A document with one tile of noise, and one of text alone.

    Noise, because a picture of even areas does not tell tokens apart that lie in another order.

    Args:
        config: of the network.
        tokenizer: gives ids to words; without one they are drawn from the vocabulary.
    """
    generator = torch.Generator().manual_seed(_SEED)
    side = tile_size(config)
    tile = torch.randint(0, 256, (1, 3, side, side), generator=generator, dtype=torch.uint8)
    rows = config.text_config.vocab_size
    # Without a tokenizer no id may have been chosen yet, and any will do.
    slot = config.image_token_id if config.image_token_id < rows else rows - 1
    words = _words(tokenizer, rows, generator)
    words = words[words != slot]
    image = torch.tensor([slot] * config.image_seq_length)
    if tokenizer is not None:
        start, end = (torch.tensor(text_ids(tokenizer, token)[0]) for token in (IMAGE_START_TOKEN, IMAGE_END_TOKEN))
        image = torch.cat([start, image, end])
    return (
        Probe("image", torch.cat([image, words]), normalize_tiles(tile, dtype=torch.float32), slot),
        Probe("text", words, None, slot),
    )


def _words(tokenizer: PreTrainedTokenizerBase | None, rows: int, generator: torch.Generator) -> Tensor:
    if tokenizer is not None:
        return torch.tensor(text_ids(tokenizer, _QUESTION)[0])
    return torch.randint(0, rows, (24,), generator=generator)


def token_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of `TEXTS`."""
    return [list(tokenizer(text)["input_ids"]) for text in TEXTS]
