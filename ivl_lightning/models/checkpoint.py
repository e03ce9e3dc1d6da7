"""Opening a checkpoint of either layout: its configuration, and its tensors under native names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import InternVLConfig

from ivl_lightning.checkpoints.files import open_folder, read_json
from ivl_lightning.checkpoints.key_map import KeyTable, key_table, native_name
from ivl_lightning.checkpoints.source import CheckpointError, Renamed, TensorSource, renamed
from ivl_lightning.checkpoints.views import AsNative
from ivl_lightning.models.original_config import ORIGINAL_TYPE, from_original, native_language_class
from ivl_lightning.models.parts import text_config

Layout: TypeAlias = Literal["original", "hf"]
CONFIG_NAME = "config.json"
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was opened; no weights have been read yet.

    Attributes:
        folder: it lies in.
        layout: of its files.
        config: native; see `original_config.RECORD` for what the original said.
        tensors: under native names.
    """

    folder: Path
    layout: Layout
    config: InternVLConfig
    tensors: TensorSource


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of either layout.

    Raises:
        CheckpointError: no configuration, one of another kind of model, or files that are missing or damaged.
    """
    folder = Path(path)
    values = read_config_values(folder)
    config = config_of(values, folder)
    if layout_of(values, folder) == "original":
        return Checkpoint(folder, "original", config, AsNative(open_folder(folder), table_of(config)))
    tensors = renamed(open_folder(folder), native_name)
    return Checkpoint(folder, "hf", config, untied(tensors, values))


def read_config(path: str | Path) -> InternVLConfig:
    """The native configuration of a folder of either layout.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """
    folder = Path(path)
    return config_of(read_config_values(folder), folder)


def read_config_values(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder}: there is no config.json; give the folder of a checkpoint of either layout")
    return read_json(folder / CONFIG_NAME)


def layout_of(values: Mapping[str, Any], folder: Path) -> Layout:
    """The layout a config.json belongs to.

    Raises:
        CheckpointError: to none of an InternVL model.
    """
    kind = values.get("model_type")
    if kind == ORIGINAL_TYPE:
        return "original"
    if kind == InternVLConfig.model_type:
        return "hf"
    raise CheckpointError(
        f"{folder / CONFIG_NAME}: model_type is {kind!r}, needed is {ORIGINAL_TYPE!r} (the original's layout) or "
        f"{InternVLConfig.model_type!r} (transformers' layout, names ending in -hf). A vision tower or language model "
        "of its own goes to model.vision_path or model.language_model_path"
    )


def config_of(values: Mapping[str, Any], folder: Path) -> InternVLConfig:
    """The native configuration of a config.json.

    Raises:
        CheckpointError: a field is missing, wrong or not supported.
    """
    if layout_of(values, folder) == "original":
        return from_original(values, folder / CONFIG_NAME)
    try:
        config: InternVLConfig = InternVLConfig.from_dict(dict(values))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: a field cannot be used: {error}") from error
    # In memory embeddings and head are never shared, as in every original.
    config.tie_word_embeddings = text_config(config).tie_word_embeddings = False
    return config


def table_of(config: InternVLConfig, language: str | None = None) -> KeyTable:
    """The key table between a model's native names and those of the original.

    Args:
        config: native.
        language: the original's class of the language model; the recorded or own one by default.

    Raises:
        CheckpointError: the original has no class for the language model.
    """
    text = text_config(config)
    return key_table(language or native_language_class(config), text.num_attention_heads, text.num_key_value_heads)


def untied(tensors: TensorSource, values: Mapping[str, Any]) -> TensorSource:
    """Tensors of a model whose files leave out the head because it is the embeddings.

    Args:
        tensors: with native names.
        values: config.json, whose `tie_word_embeddings` must say so.
    """
    text = values.get("text_config") or values
    ties = values.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    if HEAD in tensors.names() or not ties:
        return tensors
    return Renamed(tensors, {**{name: name for name in tensors.names()}, HEAD: EMBEDDINGS})
