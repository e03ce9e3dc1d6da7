"""A tiny model, tokenizer and data set, made in place, for tests of every room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from ivl_lightning.config.schema import DataConfig, ModelConfig
from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.collate import pack_samples
from ivl_lightning.data.collate_pairs import pack_pairs
from ivl_lightning.models.loader import build_model
from ivl_lightning.models.tokenizer import image_token_id, load_tokenizer
from ivl_lightning.structures import Encoded, EncodedPair, Pack, PackedBatch, PlannedPack, PreferenceBatch

TOKENIZER = Path(__file__).parent / "fixtures/conversation/qwen2_vit300m"
TILE_SIZE, PATCH_SIZE, TILE_TOKENS = 32, 8, 4


def tiny_config(**changes: object) -> ModelConfig:
    """32-pixel tiles of 8-pixel patches (4 tokens a tile), two layers each side."""
    settings: dict[str, object] = {
        "name": "tiny",
        "vision": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            "image_size": TILE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        "language_model": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
        },
    }
    return ModelConfig(**{**settings, **changes})


def load_tiny_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(TOKENIZER))


def build_tiny_model(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, **changes: object
) -> InternVLForConditionalGeneration:
    """Random weights of a size at which logits differ clearly between tokens."""
    torch.manual_seed(seed)
    model = build_model(tiny_config(**changes), tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def random_document(rng: np.random.Generator, length: int, *, tiles: int = 0, trained: int = 3) -> Encoded:
    """Random text with `tiles` image tiles in front; the last `trained` tokens are supervised."""
    slot = image_token_id(load_tiny_tokenizer())
    ids = [slot] * (tiles * TILE_TOKENS) + rng.integers(1, 400, length).tolist()
    labels = [IGNORE_INDEX] * (len(ids) - trained) + ids[len(ids) - trained :]
    pixels = rng.integers(0, 256, (tiles, 3, TILE_SIZE, TILE_SIZE), dtype=np.uint8) if tiles else None
    return Encoded(ids, labels, None if pixels is None else torch.from_numpy(pixels))


def pack(
    documents: Sequence[Encoded], *, reduction: str = "square", weight_sum: float = 1.0, **plan: int
) -> PackedBatch:
    planned = PlannedPack(
        Pack(tuple(range(len(documents))), sum(len(d.input_ids) for d in documents), 0),
        epoch=0,
        step=0,
        micro_step=plan.get("micro_step", 0),
        num_micro_steps=plan.get("num_micro_steps", 1),
        packs_per_step=plan.get("packs_per_step", 1),
        weight_sum=weight_sum,
        progress=0.0,
    )
    return pack_samples(
        documents,
        planned=planned,
        reduction=reduction,
        dataset_ids=[0] * len(documents),
        sample_ids=[f"document {number}" for number in range(len(documents))],
        filler_id=0,
        tile_size=TILE_SIZE,
    )


def write_tiny_data(folder: Path, *, rows: int = 12, **meta: object) -> Path:
    """Two data sets in the official format, pictures of several sizes and text; returns meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images, texts = [], []
    for number in range(rows):
        size = [(32, 32), (64, 32), (40, 70)][number % 3]
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        image = f"{number}.png" if number % 4 else [f"{number}.png", "0.png"]
        question = "<image>\nWhat is it?" if number % 4 else "<image>\n<image>\nCompare."
        images.append(_row(f"image-{number}", question, "noise " * (1 + number % 3), image=image))
        texts.append(_row(f"text-{number}", f"Say {number}.", str(number)))
    for name, lines in (("pictures", images), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"root": ".", "data_augment": False, "repeat_time": 1, "max_dynamic_patch": 4, **meta}
    content = {name: {**entry, "annotation": f"{name}.jsonl"} for name in ("pictures", "text")}
    (folder / "meta.json").write_text(json.dumps(content))
    return folder / "meta.json"


def _row(identity: str, question: str, answer: str, **media: object) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer.strip()}]
    return {"id": identity, **media, "conversations": turns}


def write_tiny_pairs(folder: Path, *, rows: int = 12, **meta: object) -> Path:
    """Two data sets of preference pairs: one or two pictures, and text; returns meta.json.

    Answers begin alike or not, and are of different lengths.
    """
    write_tiny_data(folder, rows=rows)
    pictures, texts = [], []
    for number in range(rows):
        image: object = f"{number}.png" if number % 4 else [f"{number}.png", "0.png"]
        question = "What is it?" if number % 4 else "<image>\n<image>\nCompare."
        answers = {"chosen": "It is noise" + ", more noise" * (number % 3), "rejected": f"It is a cat {number}"}
        pictures.append({"id": f"pair-{number}", "image": image, "question": question, **answers})
        texts.append({"question": f"Say {number}.", "chosen": str(number), "rejected": "no " * (1 + number % 4)})
    for name, lines in (("pictures", pictures), ("text", texts)):
        (folder / f"{name}_pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"root": ".", "data_augment": True, "repeat_time": 1, "max_dynamic_patch": 4, **meta}
    content = {f"{name}_pairs": {**entry, "annotation": f"{name}_pairs.jsonl"} for name in ("pictures", "text")}
    (folder / "pairs.json").write_text(json.dumps(content))
    return folder / "pairs.json"


def random_pair(
    rng: np.random.Generator, prompt: int, chosen: int, rejected: int, *, tiles: int = 0, unlabeled: int = 0
) -> EncodedPair:
    """Random text with `tiles` image tiles in front; both answers are supervised but for their first tokens."""
    slot = image_token_id(load_tiny_tokenizer())
    text, first, second = (rng.integers(1, 400, length).tolist() for length in (prompt, chosen, rejected))
    pixels = rng.integers(0, 256, (tiles, 3, TILE_SIZE, TILE_SIZE), dtype=np.uint8) if tiles else None
    first_labels, second_labels = ([IGNORE_INDEX] * unlabeled + ids[unlabeled:] for ids in (first, second))
    tensor = None if pixels is None else torch.from_numpy(pixels)
    return EncodedPair([slot] * (tiles * TILE_TOKENS) + text, first, first_labels, second, second_labels, tensor)


def pair_batch(pairs: Sequence[EncodedPair], *, shared_prefix: bool = True, **plan: int) -> PreferenceBatch:
    planned = PlannedPack(
        Pack(tuple(range(len(pairs))), 0, 0),
        epoch=0,
        step=0,
        micro_step=plan.get("micro_step", 0),
        num_micro_steps=plan.get("num_micro_steps", 1),
        packs_per_step=plan.get("packs_per_step", 1),
        weight_sum=float(len(pairs)),
        progress=0.0,
        step_samples=len(pairs),
    )
    return pack_pairs(
        pairs,
        planned=planned,
        dataset_ids=[0] * len(pairs),
        sample_ids=[f"pair {number}" for number in range(len(pairs))],
        sample_rows=list(range(len(pairs))),
        reference_logps=[(0.0, 0.0)] * len(pairs),
        filler_id=0,
        tile_size=TILE_SIZE,
        shared_prefix=shared_prefix,
    )


def tiny_data_config(meta: Path, **changes: object) -> DataConfig:
    settings: dict[str, object] = {
        "meta": str(meta),
        "packs_per_step": 4,
        "max_tokens": 256,
        "max_pack_tiles": 16,
        "tile_size": TILE_SIZE,
        "max_tiles": 4,
        "val_max_tiles": 4,
        "num_workers": 0,
        "generation_batch": 4,
    }
    return DataConfig(**{**settings, **changes})
