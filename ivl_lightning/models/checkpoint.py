"""Opening a checkpoint of either layout: its configuration, and its tensors under native names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, InternVLConfig, PreTrainedTokenizerBase

from ivl_lightning.checkpoints.adapters import Merged, adapter_base, adapter_scale, is_adapter, open_adapter
from ivl_lightning.checkpoints.files import open_folder, read_json
from ivl_lightning.checkpoints.key_map import KeyTable, key_table, native_name
from ivl_lightning.checkpoints.source import CheckpointError, Combined, Renamed, TensorSource, renamed
from ivl_lightning.checkpoints.views import AsNative, is_computed
from ivl_lightning.constants import IMAGE_CONTEXT_TOKEN
from ivl_lightning.models.config_checks import built
from ivl_lightning.models.original_config import ORIGINAL_TYPE, from_original, native_language_class
from ivl_lightning.models.parts import patch_size, text_config, tile_size
from ivl_lightning.models.positions import ResizedPositions
from ivl_lightning.models.tokenizer import has_tokenizer, image_token_id, load_tokenizer

Layout: TypeAlias = Literal["original", "hf"]
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
ORIGINAL_LORA_SCALE = 2.0
"""alpha / rank of every adapter of the original: alpha is twice the rank."""
_TIED = {
    "language_model.lm_head.weight": "language_model.model.embed_tokens.weight",
    "language_model.output.weight": "language_model.model.tok_embeddings.weight",
}
"""Heads of the original's language models, and the embeddings that stand for them where the two are one."""
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Original:
    """What a folder of the original's layout says, as it says it.

    Attributes:
        values: its config.json.
        tensors: under the original's names, adapters merged.
    """

    values: Mapping[str, Any]
    tensors: TensorSource


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was opened; no weights have been read yet.

    Attributes:
        folder: it lies in.
        config: native; see `original_config.RECORD` for what the original said.
        tensors: under native names.
        original: of a folder in the original's layout.
        tokenizer: loads its tokenizer; None where there is none.
        generation: its settings of generation, if it has some.
    """

    folder: Path
    config: InternVLConfig
    tensors: TensorSource
    original: Original | None = None
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
    generation: GenerationConfig | None = None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of either layout, or of an adapter in peft's format, which is merged into its base.

    Raises:
        CheckpointError: no configuration, one of another kind of model, or files that are missing or damaged.
    """
    folder = Path(path)
    if is_adapter(folder):
        return _open_adapted(folder)
    values = read_config_values(folder)
    config = config_of(values, folder)
    tokenizer, generation = tokenizer_in(folder), generation_in(folder)
    if layout_of(values, folder) == "hf":
        tensors = renamed(open_folder(folder), lambda name: None if is_computed(name) else native_name(name))
        return Checkpoint(folder, config, untied(tensors, values), tokenizer=tokenizer, generation=generation)
    original = Original(values, _with_head(_merged_original(open_folder(folder)), values))
    if tokenizer is not None:
        config.image_token_id = _image_token_id(folder, tokenizer())
    native = _at_tile_size(AsNative(original.tensors, table_of(config)), config, values)
    return Checkpoint(folder, config, native, original, tokenizer, generation)


def _at_tile_size(tensors: TensorSource, config: InternVLConfig, values: Mapping[str, Any]) -> TensorSource:
    """Positions for the size that `force_image_size` asks for; the original resizes them whenever they are used."""
    side = tile_size(config)
    if values["vision_config"].get("image_size", side) == side:
        return tensors
    return ResizedPositions(tensors, side // patch_size(config))


def _open_adapted(folder: Path) -> Checkpoint:
    base = open_checkpoint(adapter_base(folder))
    tensors = Merged(Combined([base.tensors, open_adapter(folder)]), adapter_scale(folder))
    tokenizer = tokenizer_in(folder) or base.tokenizer
    return Checkpoint(folder, base.config, tensors, tokenizer=tokenizer, generation=base.generation)


def _merged_original(files: TensorSource) -> TensorSource:
    adapted = any(".lora_" in name for name in files.names())
    return Merged(files, ORIGINAL_LORA_SCALE) if adapted else files


def _image_token_id(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """The original's config.json does not say which id stands for image features."""
    try:
        return image_token_id(tokenizer)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: {IMAGE_CONTEXT_TOKEN} is not among the tokenizer's tokens: its files are those of the bare "
            "language model, fetch the checkpoint's own (added_tokens.json, tokenizer_config.json)"
        ) from error


def tokenizer_folder(path: str | Path) -> Path:
    """Where a checkpoint's tokenizer lies: beside the weights, or of an adapter without one beside those of its base.

    Raises:
        CheckpointError: the base of an adapter cannot be found.
    """
    folder = Path(path)
    return adapter_base(folder) if is_adapter(folder) and not has_tokenizer(folder) else folder


def tokenizer_in(folder: Path) -> Callable[[], PreTrainedTokenizerBase] | None:
    """Loads the tokenizer of a folder; None where there is none."""
    return partial(load_tokenizer, folder) if has_tokenizer(folder) else None


def generation_in(folder: Path) -> GenerationConfig | None:
    """The settings of generation of a folder, if it has some.

    Raises:
        CheckpointError: their file is damaged.
    """
    file = folder / GENERATION_CONFIG_NAME
    if not file.is_file():
        return None
    generation: GenerationConfig = built(file, GenerationConfig.from_dict, read_json(file))
    return generation


def read_config(path: str | Path) -> InternVLConfig:
    """The native configuration of a folder of either layout.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """
    folder = Path(path)
    if is_adapter(folder):
        return read_config(adapter_base(folder))
    return config_of(read_config_values(folder), folder)


def read_config_values(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: there is no such folder; a name on the Hugging Face hub must be fetched first "
            f"(hf download {folder} --local-dir FOLDER)"
        )
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
    # Version 4's name of `rope_type`, where a file has both spellings.
    (getattr(text_config(config), "rope_parameters", None) or {}).pop("type", None)
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


def _with_head(files: TensorSource, values: Mapping[str, Any]) -> TensorSource:
    """Files of the original whose language model was saved with its head as its embeddings, and so without it."""
    names = files.names()
    missing = [head for head, table in _TIED.items() if table in names and head not in names]
    if not missing or not _ties(values["llm_config"]):
        return files
    return Renamed(files, {**{name: name for name in names}, missing[0]: _TIED[missing[0]]})


def untied(tensors: TensorSource, values: Mapping[str, Any]) -> TensorSource:
    """Tensors of a model whose files leave out the head because it is the embeddings.

    Args:
        tensors: with native names.
        values: config.json, whose `tie_word_embeddings` must say so.
    """
    text = values.get("text_config") or values
    if HEAD in tensors.names() or not (values.get("tie_word_embeddings") or _ties(text)):
        return tensors
    return Renamed(tensors, {**{name: name for name in tensors.names()}, HEAD: EMBEDDINGS})


def _ties(text: Mapping[str, Any]) -> bool:
    """Whether a language model's head is its embeddings: as its file says, else as its class does."""
    if text.get("tie_word_embeddings") is not None:
        return bool(text["tie_word_embeddings"])
    kind = text.get("model_type")
    return kind in CONFIG_MAPPING and bool(AutoConfig.for_model(kind).tie_word_embeddings)
