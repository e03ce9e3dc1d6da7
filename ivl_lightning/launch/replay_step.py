"""One step of a run again, in a stage's process: its very batch, forward and backward, without an update."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from ivl_lightning.checkpoints.complete import newest_complete, steps_of
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import CHECKPOINTS_FOLDER
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.launch.replay import stage_folder_of
from ivl_lightning.launch.trainer import build_trainer
from ivl_lightning.stages.base import Stage
from ivl_lightning.stages.step_record import (
    MicroBatchRecord,
    StepGradients,
    StepRecord,
    StepWatch,
    gradient_checksums,
    is_finite,
)

RESULT_NAME = "replay.json"
_COLUMNS = ("rank", "micro-batch", "tokens", "tiles", "labels", "loss", "sample")
_NOT_FINITE = "not finite"


class _StopBeforeUpdate(Exception):  # noqa: N818 - it is no error
    """The step has been measured; the weights stay as they are."""


class _Replay(StepWatch):
    """Measures the first step that is run, and stops in front of its update.

    Args:
        global_step: of the step that is meant.
    """

    def __init__(self, global_step: int) -> None:
        super().__init__()
        self.global_step = global_step
        self.found: StepRecord | None = None
        self.checksums: dict[str, int] = {}

    def judge(self, trainer: L.Trainer, stage: Stage, step: StepGradients) -> None:
        """Keep what is known of the step."""
        self.found = self.record(trainer, step, global_step=self.global_step)
        self.checksums = {str(part): value for part, value in gradient_checksums(stage, trainer).items()}
        raise _StopBeforeUpdate


def replay_checkpoint(config: RunConfig, folder: Path) -> Path | None:
    """The newest checkpoint that the step can be reached from; None where only the stage's beginning is left.

    Args:
        config: with `replay`.
        folder: of `write_replay`.
    """
    return newest_complete(stage_folder_of(folder) / CHECKPOINTS_FOLDER, at_most=config.replay)


def replay_step(config: RunConfig, folder: Path, stage: Stage, datamodule: DynamicPackingDataModule) -> None:
    """Run the step `config.replay` again on the run's own layout, print what went in and came out, write replay.json.

    Args:
        config: of the replay.
        folder: of the replay; the run's own checkpoints and logs are only read.
        stage, datamodule: as the stage's process builds them.

    Raises:
        ConfigError: the run has no such step.
    """
    step = config.replay
    assert step is not None, "a replay was asked for"
    checkpoint = replay_checkpoint(config, folder)
    behind = step - (0 if checkpoint is None else steps_of(checkpoint))
    datamodule.pass_over(behind)
    replay = _Replay(step)
    trainer = build_trainer(_quiet(config), folder, [replay])
    with warnings.catch_warnings(), suppress(_StopBeforeUpdate):
        # What the run's own callbacks have in the checkpoint is of no use here.
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
        trainer.fit(stage, datamodule, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    found = replay.found
    if found is None:
        raise ConfigError(f"replay={step}: training has ended before this step")
    if not trainer.is_global_zero:
        return
    content: dict[str, Any] = {
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "steps_behind": behind,
        **found.as_json(),
        "gradient_checksums": replay.checksums,
    }
    (folder / RESULT_NAME).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    _show(found, checkpoint, behind, folder)


def _quiet(config: RunConfig) -> RunConfig:
    """The same run without what logs, saves, judges and watches; a donor's tower is still brought."""
    kept = {name: entry for name, entry in config.callbacks.items() if "donor" in (entry or {})}
    trainer = replace(config.trainer, progress_bar=False, val_every_n_steps=None, checkpoint_every_n_steps=None)
    return replace(config, callbacks=kept, logger={}, trainer=trainer)


def _show(record: StepRecord, checkpoint: Path | None, behind: int, folder: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    origin = "those the stage began with" if checkpoint is None else f"those of {checkpoint}"
    steps = "1 step" if behind == 1 else f"{behind} steps"
    age = f", [yellow]{steps} behind[/yellow] the original's" if behind else ", as in the original"
    console.print(
        f"[bold]step {record.global_step}[/bold] (epoch {record.epoch}, step {record.step_of_epoch} of it) again, "
        f"without an update. Weights: {origin}{age}"
    )
    for line in _samples(record):
        style = "bold red" if _NOT_FINITE in line else ""
        console.print(line, style=style, markup=False)
    for micro in record.micro_batches:
        if not is_finite(micro.loss):
            console.print(f"loss of rank {micro.rank}, micro-batch {micro.micro_step}: {_NOT_FINITE} ({micro.loss})")
    norms = ", ".join(f"{part} {_number(norm)}" for part, norm in record.norms.items())
    console.print(f"loss of the step: {_number(record.loss)}; norm of the gradient before clipping: {norms}")
    console.print(f"the same as numbers: {folder / RESULT_NAME}")


def _samples(record: StepRecord) -> list[str]:
    """A table; the samples' names come last and in one piece, however long their paths are."""
    rows = [_COLUMNS, *(row for micro in record.micro_batches for row in _rows(micro))]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return ["  ".join([*(map(str.rjust, row, widths)), row[-1]]) for row in rows]


def _rows(micro: MicroBatchRecord) -> list[tuple[str, ...]]:
    place = (str(micro.rank), str(micro.micro_step))
    rows: list[tuple[str, ...]] = [
        (*place, str(sample.tokens), str(sample.tiles), str(sample.labels), _number(sample.loss), sample.sample)
        for sample in micro.samples
    ]
    return rows or [(*place, "", "", "", "", "(nothing left for this rank)")]


def _number(value: float) -> str:
    return f"{value:.6g}" if is_finite(value) else f"{_NOT_FINITE} ({value})"
