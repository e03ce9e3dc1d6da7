"""A checkpoint -> a folder of either layout, complete and proven, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase

from ivl_lightning.checkpoints.key_map import hf_name
from ivl_lightning.checkpoints.source import Cast, CheckpointError, TensorSource, renamed
from ivl_lightning.checkpoints.views import AsOriginal, check_complete
from ivl_lightning.checkpoints.writer import check_space, total_bytes, write_weights, written_aside
from ivl_lightning.config.convert import Layout, WriteConfig
from ivl_lightning.conversion.companions import known_template, write_companions
from ivl_lightning.conversion.json_files import write_json
from ivl_lightning.conversion.parity import ParityReport, compare
from ivl_lightning.conversion.processor_files import check_vocabulary
from ivl_lightning.data.templates import get_template
from ivl_lightning.inference.progress import PassProgress
from ivl_lightning.models.checkpoint import CONFIG_NAME, Checkpoint, table_of
from ivl_lightning.models.original_config import is_transposed, keep_record
from ivl_lightning.models.streaming import empty_model

PARITY_NAME: Final = "parity.json"
_MB: Final = 1_000_000


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
        get_template(config.template)
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
    known_template(checkpoint)
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
