"""The progress bar of a stage: optimizer steps of the whole run, rate, time left, loss, score, rejects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.structures import PackedBatch

_SHOWN = {
    "train/loss": "loss",
    "val/score": "score",
    "val/reward_accuracy": "preferred",
    "data/fill_tokens": "fill",
    "data/rejected": "rejected",
}


class RunProgress(ProgressBar):
    """One line for training and one for validation, on the first rank.

    Lightning's own bars count batches of an epoch; a user waits for the last step of the run.

    Args:
        name: shown in front.
    """

    def __init__(self, name: str = "training") -> None:
        super().__init__()
        self.name = name
        self._progress: Progress | None = None
        self._train: TaskID | None = None
        self._validation: TaskID | None = None
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        self._open()
        if self._progress is not None:
            length = datamodule_of(trainer).horizon()
            total = None if length is None else length.steps
            name = f"{self.name} (length estimated)" if length is not None and length.estimated else self.name
            self._train = self._progress.add_task(name, total=total, completed=trainer.global_step, values="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Advance."""
        if self._progress is None or self._train is None:
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key in _SHOWN}
        values = " ".join(f"{_SHOWN[key]} {_short(key, metrics[key])}" for key in _SHOWN if key in metrics)
        self._progress.update(self._train, completed=trainer.global_step, values=values)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close."""
        self._close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A line for the validation batches."""
        self._open_line("validation", trainer.num_val_batches)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance."""
        if self._progress is not None and self._validation is not None:
            self._progress.advance(self._validation)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the validation line away again; close where no training goes on around it."""
        if self._progress is not None and self._validation is not None:
            self._progress.remove_task(self._validation)
            self._validation = None
        if self._train is None:
            self._close()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A line for the batches of all tile limits."""
        self._open_line("tile limits", trainer.num_test_batches)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance."""
        self.on_validation_batch_end(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As behind a validation."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal usable."""
        self._close()

    def _open_line(self, name: str, batches: Sequence[int | float]) -> None:
        """A line for what is no training."""
        self._open()
        if self._progress is not None:
            self._validation = self._progress.add_task(name, total=sum(map(int, batches)), values="")

    def _open(self) -> None:
        if self._progress is not None or not self._enabled:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[values]}"),
        )
        self._progress = Progress(*columns)
        self._progress.start()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._train = self._validation = None


class _RateColumn(TextColumn):
    """Items per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Any) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f}/s")


def _short(key: str, value: float) -> str:
    if key == "train/loss":
        return f"{value:.3f}"
    return f"{value:.0f}" if key == "data/rejected" else f"{value:.0%}"
