"""Tokenizer files of exported folders, which give the ids of training to programs that know transformers only."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ivl_lightning.conversion.json_files import to_json, write_json
from ivl_lightning.models.tokenizer import load_tokenizer

# Takes tokenizer.json as it is. The families' own classes build part of it anew and lose, for one, legacy blanks.
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_NO_LIMIT = 10**12
"""A `model_max_length` above is the library's way to say that there is none."""


def write_fast_files(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, named: Mapping[str, str], **config: object
) -> list[str]:
    """Write `tokenizer.json` and its two companions, which transformers 4 and 5 read alike.

    Args:
        folder: the exported folder.
        tokenizer: as `load_tokenizer` returns it; not changed.
        max_length: tokens of the longest prompt, where the tokenizer itself names no limit.
        named: further attributes and their tokens, such as `start_image_token`; tokens that the vocabulary has.
        **config: further entries of `tokenizer_config.json`.

    Returns:
        Names of the files.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))
    entries = {**_shared_entries(tokenizer, max_length), "tokenizer_class": _PLAIN_CLASS, **config}
    if named:
        # A dict, for version 4, which a list (as version 5 writes) makes fail.
        entries["extra_special_tokens"] = dict(named)
    write_json(folder / "tokenizer_config.json", entries)
    # Beside a dict, transformers 5.17 reads the list of special tokens from this file only.
    write_json(folder / "special_tokens_map.json", _special_tokens(tokenizer))
    return ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def write_slow_files(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, **config: object
) -> list[str]:
    """Write Qwen2's `vocab.json` and `merges.txt` with the files around them, if they say all of this tokenizer.

    Args:
        folder: the exported folder.
        tokenizer: as for `write_fast_files`.
        max_length: as for `write_fast_files`.
        **config: as for `write_fast_files`.

    Returns:
        Names of the files; none, and nothing is written, where the tokenizer is of another family.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return []
    entries = {**_shared_entries(tokenizer, max_length), "tokenizer_class": "Qwen2Tokenizer", **config}
    entries["added_tokens_decoder"] = {
        str(number): _flags(token) for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    texts = {
        "vocab.json": to_json(dict(sorted(model["vocab"].items(), key=lambda item: item[1])), indent=None),
        "merges.txt": "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in _merges(model)),
        "added_tokens.json": to_json(tokenizer.get_added_vocab()),
        "special_tokens_map.json": to_json(_special_tokens(tokenizer)),
        "tokenizer_config.json": to_json(entries),
    }
    with tempfile.TemporaryDirectory() as trial:
        _write_texts(Path(trial), texts)
        if _identity(load_tokenizer(trial)) != _identity(tokenizer):
            return []
    _write_texts(folder, texts)
    return list(texts)


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _shared_entries(tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    own_limit = tokenizer.model_max_length
    return {
        **_special_tokens(tokenizer),
        "clean_up_tokenization_spaces": False,
        # Without `token_type_ids`, which version 4 returns by default and no language model here accepts.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": own_limit if own_limit < _NO_LIMIT else max_length,
        "split_special_tokens": False,
    }


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """BOS, EOS and so on, and the list of the others."""
    standard = PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
    known = {name: token for name, token in tokenizer.special_tokens_map.items() if name in standard}
    if "pad_token" not in known and "eos_token" in known:
        known["pad_token"] = known["eos_token"]
    return {**known, "additional_special_tokens": list(tokenizer.extra_special_tokens)}


def _flags(token: Any) -> dict[str, object]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {flag: getattr(token, flag) for flag in flags}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _identity(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """All that decides which ids a text gets; offsets may differ."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = json.dumps(state["pre_tokenizer"], sort_keys=True)
    splitter = splitter.replace('"trim_offsets": false', '"trim_offsets": true')
    model, added = state["model"], sorted(state["added_tokens"], key=lambda token: token["id"])
    return model["vocab"], _merges(model), state["normalizer"], splitter, added, tokenizer("")["input_ids"]
