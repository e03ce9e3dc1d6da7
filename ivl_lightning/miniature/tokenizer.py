"""A small byte-level tokenizer of Qwen2's kind, trained on the miniature's own text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from ivl_lightning.constants import SPECIAL_TOKENS

LEARNED_TOKENS = 640
"""Most tokens learned: 256 bytes, then merges."""

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MODEL_MAX_LENGTH = 4096


def train_tokenizer(folder: Path, corpus: Iterable[str]) -> None:
    """Learn a byte-level BPE from `corpus` and write it to `folder` as transformers reads it.

    The pre-tokenizer is Qwen2's, which splits numbers into single digits; any other text falls back to bytes.

    Args:
        folder: gets `tokenizer.json` and `tokenizer_config.json`.
        corpus: texts without chat markers, which are tokens of their own.
    """
    tokenizer = Qwen2Tokenizer(
        **_learn(corpus),
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=MESSAGE_END,
        additional_special_tokens=[MESSAGE_START, *SPECIAL_TOKENS],
        model_max_length=MODEL_MAX_LENGTH,
    )
    tokenizer.save_pretrained(folder)


def _learn(corpus: Iterable[str]) -> dict[str, Any]:
    """Vocabulary and merges, learned with the pre-tokenizer of an empty Qwen2 tokenizer."""
    learner = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    model = json.loads(learner.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}
