"""What lies beside the weights of a checkpoint: configurations, tokenizer, image settings, chat template, code."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from transformers import GenerationConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ivl_lightning.checkpoints.lineage import LINEAGE_NAME
from ivl_lightning.checkpoints.source import CheckpointError, TensorSource
from ivl_lightning.config.convert import Layout
from ivl_lightning.constants import IMAGE_CONTEXT_TOKEN
from ivl_lightning.conversion.json_files import write_json
from ivl_lightning.conversion.processor_files import write_processor_files
from ivl_lightning.data.templates import stop_ids, template_of
from ivl_lightning.models.checkpoint import CONFIG_NAME, GENERATION_CONFIG_NAME, Checkpoint
from ivl_lightning.models.original_config import image_settings, to_original
from ivl_lightning.models.parts import text_config
from ivl_lightning.models.tokenizer import filler_id

_TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)


def write_companions(
    checkpoint: Checkpoint,
    folder: Path,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    dtype: torch.dtype | None,
) -> list[str]:
    """Write all that lies beside the weights: configurations, tokenizer, image settings, chat template, code, lineage.

    Args:
        checkpoint: whose they are.
        folder: to be written to.
        layout: of the folder.
        tokenizer: of the checkpoint.
        dtype: of the written weights; None where each tensor kept its own.

    Returns:
        What a reader should know, for the report.

    Raises:
        ValueError: the tokenizer does not fit the model, or the template is not known.
    """
    settings = image_settings(checkpoint.config)
    chosen = known_template(checkpoint)
    notes = ["the source has no tokenizer, so the target has none"] if tokenizer is None else []
    if tokenizer is None and layout == "hf":
        notes.append(
            f"without a tokenizer the id of {IMAGE_CONTEXT_TOKEN} is not known: image_token_id="
            f"{checkpoint.config.image_token_id} in config.json is only what was there, or transformers' default"
        )
    _copy(checkpoint.folder, folder, (LINEAGE_NAME,))
    copied = layout == "original" and checkpoint.original is not None
    stored = dtype or _stored_dtype(checkpoint.tensors)
    _write_config(checkpoint, folder, layout, template=chosen, dtype=stored)
    _write_generation_config(checkpoint, folder, tokenizer, chosen)
    if copied:
        _copy(checkpoint.folder, folder, _TOKENIZER_FILES)
        return notes + _copy_code(checkpoint, folder)
    if layout == "original":
        notes.append("the layout's modeling code (*.py) is not written: copy it from a release of the same kind")
    if tokenizer is not None:
        write_processor_files(
            folder,
            tokenizer,
            checkpoint.config,
            template=chosen,
            layout=layout,
            min_tiles=settings["min_dynamic_patch"],
            max_tiles=settings["max_dynamic_patch"],
            use_thumbnail=settings["use_thumbnail"],
            dynamic=settings["dynamic_image_size"],
        )
    return notes


def known_template(checkpoint: Checkpoint) -> str:
    """The checkpoint's chat template.

    Raises:
        CheckpointError: it is not known.
    """
    try:
        return template_of(None, checkpoint.config)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder / CONFIG_NAME}: {error}") from error


def _stored_dtype(tensors: TensorSource) -> torch.dtype:
    """The type most of the numbers have."""
    sizes: dict[torch.dtype, int] = {}
    for name in tensors.names():
        meta = tensors.meta(name)
        sizes[meta.dtype] = sizes.get(meta.dtype, 0) + meta.numel()
    return max(sizes, key=lambda kind: sizes[kind])


def _write_config(checkpoint: Checkpoint, folder: Path, layout: Layout, *, template: str, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if layout == "original":
        write_json(folder / CONFIG_NAME, {**to_original(checkpoint.config, template=template), "torch_dtype": name})
        return
    config = checkpoint.config
    config.architectures = [InternVLForConditionalGeneration.__name__]
    values = {**config.to_dict(), "dtype": name}
    for part in ("text_config", "vision_config"):
        values[part] = {**values[part], "dtype": name}
    # vLLM and LMDeploy choose the language model by it.
    values["text_config"]["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config(config).model_type]]
    values["text_config"] |= _old_rope(values["text_config"])
    values |= {"torch_dtype": name}
    values.pop("_name_or_path", None)
    write_json(folder / CONFIG_NAME, values)


def _old_rope(text: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings as version 4 of transformers reads them, which takes its defaults where they are missing.

    Servers of that age would compute something else without a word.
    """
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" not in rope:
        return {}
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    rope.pop("partial_rotary_factor", None)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind == "longrope":
        # Its class takes three fields and no more; the fourth is one of its own.
        rope.pop("original_max_position_embeddings", None)
        return {"rope_theta": theta, "rope_scaling": {"type": kind, **rope}}
    return {"rope_theta": theta, "rope_scaling": {"type": kind, "rope_type": kind, **rope}}


def _write_generation_config(
    checkpoint: Checkpoint, folder: Path, tokenizer: PreTrainedTokenizerBase | None, template: str
) -> None:
    """The source's settings; and an answer ends where the template ends it, which not every release says."""
    generation = copy.deepcopy(checkpoint.generation) or GenerationConfig()
    if tokenizer is not None:
        own = generation.eos_token_id
        known = own if isinstance(own, list) else [own]
        generation.eos_token_id = sorted(
            {*(token for token in known if token is not None), *stop_ids(tokenizer, template)}
        )
        generation.pad_token_id = filler_id(tokenizer)
    # The library refuses to write settings of a sampling that is switched off, which some releases hold.
    write_json(folder / GENERATION_CONFIG_NAME, generation.to_diff_dict())


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _copy_code(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy modeling code byte for byte; it is never run."""
    code = sorted(checkpoint.folder.glob("*.py"))
    for file in code:
        shutil.copyfile(file, folder / file.name)
    if code:
        return []
    return [
        "the source holds no modeling code (*.py), so the target holds none: copy it from a release of the same kind"
    ]
