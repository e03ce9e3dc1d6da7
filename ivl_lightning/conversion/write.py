"""A checkpoint -> a folder of either layout, complete and proven, or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import GenerationConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ivl_lightning.checkpoints.key_map import hf_name
from ivl_lightning.checkpoints.source import Cast, CheckpointError, TensorSource, renamed
from ivl_lightning.checkpoints.views import AsOriginal, check_complete
from ivl_lightning.checkpoints.writer import check_space, total_bytes, write_weights, written_aside
from ivl_lightning.config.convert import Layout, WriteConfig
from ivl_lightning.constants import IMAGE_CONTEXT_TOKEN
from ivl_lightning.conversion.parity import ParityReport, compare
from ivl_lightning.conversion.processor_files import check_vocabulary, write_processor_files
from ivl_lightning.data.templates import stop_ids, template_of
from ivl_lightning.inference.progress import PassProgress
from ivl_lightning.models.checkpoint import CONFIG_NAME, GENERATION_CONFIG_NAME, Checkpoint, table_of
from ivl_lightning.models.original_config import image_settings, is_transposed, keep_record, to_original
from ivl_lightning.models.parts import text_config
from ivl_lightning.models.streaming import empty_model
from ivl_lightning.models.tokenizer import filler_id

PARITY_NAME: Final = "parity.json"
_MB: Final = 1_000_000
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


class ParityError(ValueError):
    """What was written is not what it was made from.

    Attributes:
        report: what was found.
    """

    def __init__(self, report: ParityReport, kept: Path) -> None:
        super().__init__(f"nothing was written, because {'; '.join(report.faults)}. The whole report: {kept}")
        self.report = report


def write_checkpoint(
    checkpoint: Checkpoint, config: WriteConfig, *, also: Callable[[Path], None] = lambda _: None
) -> ParityReport:
    """Write a checkpoint in a layout, with all that its readers look for, and prove that it is the same.

    Everything is written aside and takes the target's name when the comparison has passed.

    Args:
        checkpoint: what is written.
        config: where to and how.
        also: writes further files into the folder, once the comparison has passed.

    Returns:
        The comparison, also `parity.json` in the target.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or the layout cannot express it.
        ParityError: source and target differ.
        DiskError: no space.
        ValueError: the target exists, or the tokenizer does not fit the model.
    """
    target, dtype = Path(config.target), None if config.dtype is None else getattr(torch, config.dtype)
    if target.is_symlink():
        target = target.resolve()
    if config.template is not None:
        keep_record(checkpoint.config, config.template)
    _check_apart(checkpoint, target)
    kept = target.with_name(f"{target.name}.{PARITY_NAME}")
    _check_whole(checkpoint)
    tokenizer = _checked_tokenizer(checkpoint)
    tensors = Cast(_as_layout(checkpoint, config.layout), dtype)
    size = total_bytes(tensors)
    check_space(target, size)
    with written_aside(target, overwrite=config.overwrite) as aside:
        with PassProgress("writing", "MB", size // _MB, show=config.progress_bar) as bar:
            write_weights(
                tensors,
                aside,
                shard_bytes=int(config.shard_gb * 1e9),
                advance=_megabytes(bar, config.target),
            )
        notes = write_companions(checkpoint, aside, config.layout, tokenizer, dtype=dtype)
        with PassProgress("comparing", "MB", size // _MB, show=config.progress_bar) as bar:
            report = compare(
                checkpoint,
                aside,
                dtype=dtype,
                bound=config.bound,
                run_logits=config.logits,
                memory=config.memory_gb * 1e9,
                notes=notes,
                advance=_megabytes(bar, config.target),
            )
        report = replace(report, target=str(target))
        if report.faults:
            write_json(kept, report.as_json())
            raise ParityError(report, kept)
        write_json(aside / PARITY_NAME, report.as_json())
        also(aside)
    kept.unlink(missing_ok=True)
    return report


def write_trained(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what a stage has trained, as `write_checkpoint` does but without comparison; what was there is replaced.

    A network of `ps_version` v1 keeps the original's layout, which alone can say so.

    Args:
        checkpoint: weights in memory.
        folder: of the stage's weights.

    Raises:
        DiskError: no space.
    """
    layout: Layout = "original" if is_transposed(checkpoint.config) else "hf"
    with written_aside(folder, overwrite=True) as aside:
        write_weights(_as_layout(checkpoint, layout), aside)
        write_companions(checkpoint, aside, layout, _checked_tokenizer(checkpoint), dtype=None)


def _megabytes(bar: PassProgress, name: str) -> Any:
    """Counts bytes on a bar of megabytes, without losing the parts of one."""
    total = 0

    def advance(count: int) -> None:
        nonlocal total
        before, total = total // _MB, total + count
        bar.advance(name, total // _MB - before)

    return advance


def _check_apart(checkpoint: Checkpoint, target: Path) -> None:
    """Nothing that is read may lie where the target is to be: replacing it would take the source away."""
    if not target.name or target.name == "..":
        raise ValueError(f"target={target} has no name of its own: give a folder that is to be made")
    place = target.resolve()
    if place == checkpoint.folder.resolve():
        raise ValueError(f"target={target} is the folder that is read: give another one")
    files = {checkpoint.tensors.where(name) for name in checkpoint.tensors.names()}
    # As they are named, and where links lead.
    paths = {path for file in files for path in (Path(file).absolute(), Path(file).resolve())}
    inside = [path for path in sorted(paths) if path.is_relative_to(place)]
    if inside or checkpoint.folder.resolve().is_relative_to(place):
        raise ValueError(
            f"target={target} holds the source, or its base ({inside[0] if inside else checkpoint.folder}): give "
            "another folder"
        )


def _check_whole(checkpoint: Checkpoint) -> None:
    attention = {"text_config": "sdpa", "vision_config": "sdpa"}
    described_by = str(checkpoint.folder / CONFIG_NAME)
    model = empty_model(checkpoint.config, dtype=torch.float32, attention=attention, described_by=described_by)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    check_complete(checkpoint.tensors, shapes, described_by)


def _checked_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, which must fit the model, and a template that is known: before hours of writing."""
    _template(checkpoint)
    if checkpoint.tokenizer is None:
        return None
    tokenizer = checkpoint.tokenizer()
    check_vocabulary(tokenizer, checkpoint.config)
    return tokenizer


def _as_layout(checkpoint: Checkpoint, layout: Layout) -> TensorSource:
    if layout == "original":
        return AsOriginal(checkpoint.tensors, table_of(checkpoint.config))
    if is_transposed(checkpoint.config):
        raise CheckpointError(
            f"{checkpoint.folder} is of ps_version v1 (InternVL 1.1, 1.2): its image tokens run down the columns of a "
            "tile, which transformers' model cannot do and no change of weights can express. Use layout=original"
        )
    return renamed(checkpoint.tensors, hf_name)


def write_companions(
    checkpoint: Checkpoint,
    folder: Path,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    dtype: torch.dtype | None,
) -> list[str]:
    """Write all that lies beside the weights: configurations, tokenizer, image settings, chat template, code.

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
    chosen = _template(checkpoint)
    notes = ["the source has no tokenizer, so the target has none"] if tokenizer is None else []
    if tokenizer is None and layout == "hf":
        notes.append(
            f"without a tokenizer the id of {IMAGE_CONTEXT_TOKEN} is not known: image_token_id="
            f"{checkpoint.config.image_token_id} in config.json is only what was there, or transformers' default"
        )
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


def _template(checkpoint: Checkpoint) -> str:
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


def write_json(file: Path, content: Any) -> None:
    """Write JSON in UTF-8, one entry a line; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
