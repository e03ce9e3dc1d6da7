"""How long an optimizer step takes."""

from __future__ import annotations

import time

import lightning as L
from lightning.pytorch.callbacks import Callback


class StepClock(Callback):
    """Seconds from the end of one step to the end of the next, without validation and the making of loaders."""

    def __init__(self) -> None:
        self._since = 0.0

    def lap(self) -> float:
        """Seconds since the last lap; begins the next one."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return seconds

    def leave_out(self, seconds: float) -> None:
        """Time since the last lap that is no part of a step."""
        self._since += seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.lap()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A new epoch's loader has just been made; that is no part of a step."""
        self.lap()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nor is validation."""
        self.lap()
