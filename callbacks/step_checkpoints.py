"""Checkpoints between optimizer steps: a run that is killed loses little, and there is always one to go on from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from ivl_lightning.checkpoints.complete import (
    checkpoint_name,
    checkpoints_in,
    is_complete,
    newest_complete,
    remove,
    steps_of,
)
from ivl_lightning.constants import CHECKPOINTS_FOLDER
from ivl_lightning.strategies.folder_checkpoints import FolderCheckpoints

_log = logging.getLogger(__name__)


class StepCheckpoints(Checkpoint):
    """Saves every so many optimizer steps and keeps the newest ones.

    An older checkpoint is removed only when a newer one stands whole, also where saving goes on behind training.

    Args:
        folder: where they go, `step=00000100.ckpt` and so on; by default `checkpoints` below the trainer's own.
        every: optimizer steps between two of them; None saves on request alone.
        keep: whole checkpoints kept, at least 1.

    Raises:
        ValueError: `keep` or `every` below 1.
    """

    def __init__(self, folder: str | Path | None = None, *, every: int | None = None, keep: int = 3) -> None:
        super().__init__()
        if keep < 1 or (every is not None and every < 1):
            raise ValueError(f"keep={keep} and every={every} must be at least 1 (every may be None)")
        self.every, self.keep = every, keep
        self._folder = None if folder is None else Path(folder)
        self._seen = 0

    def folder_of(self, trainer: L.Trainer) -> Path:
        """Where this trainer's checkpoints lie."""
        return self._folder or Path(trainer.default_root_dir) / CHECKPOINTS_FOLDER

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from here."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save behind a step whose turn it is."""
        steps = trainer.global_step
        if steps == self._seen:
            return
        self._seen = steps
        self._prune(trainer)
        if self.every is not None and steps % self.every == 0:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save what the finished steps have made, unless that stands already; every rank must call it.

        Before the first step there is nothing that a new start would not make again.
        """
        if trainer.global_step == 0:
            return
        path = self.folder_of(trainer) / checkpoint_name(trainer.global_step)
        if trainer.strategy.broadcast(is_complete(path) if trainer.is_global_zero else False):
            return
        trainer.save_checkpoint(path)
        self._prune(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last one."""
        self.finish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A save that goes on is worth waiting for; if it fails too, the run's own fault counts."""
        try:
            # Without the other ranks, which may know of no fault.
            _finish_saving(trainer)
        except Exception:  # logged whole; raised, it would hide what has ended the run
            _log.exception("the last checkpoint was not finished")

    def finish(self, trainer: L.Trainer) -> None:
        """Wait until a save that goes on behind training counts; every rank must call it."""
        _finish_saving(trainer)
        trainer.strategy.barrier()
        self._prune(trainer)

    def _prune(self, trainer: L.Trainer) -> None:
        """Remove all but the newest whole ones, and what older saves have left that did not end."""
        if not trainer.is_global_zero:
            return
        folder = self.folder_of(trainer)
        newest = newest_complete(folder)
        if newest is None:
            return
        older = [path for path in checkpoints_in(folder) if steps_of(path) <= steps_of(newest)]
        whole = [path for path in older if is_complete(path)]
        for path in set(older) - set(whole[-self.keep :]):
            remove(path)


def savers_of(trainer: L.Trainer) -> list[StepCheckpoints]:
    """Those among a trainer's callbacks."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, StepCheckpoints)]


def _finish_saving(trainer: L.Trainer) -> None:
    if isinstance(trainer.strategy, FolderCheckpoints):
        trainer.strategy.finish_saving()
