"""Metrics on disk whatever else logs them: a line of JSON for each call, which a killed process leaves whole."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from ivl_lightning.constants import METRICS_NAME


class MetricsFile(Logger):
    """Appends to `metrics.jsonl`: `step`, the optimizer steps behind the row, and what was logged there.

    Several lines may tell of one step, and attempts of a run share the file: later values count. What is not a finite
    number is null. A line is one write to the operating system, so that it outlives the process.

    Args:
        folder: where the file goes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / METRICS_NAME
        self._opened = False

    @property
    def name(self) -> str:
        """Of the file."""
        return METRICS_NAME

    @property
    def version(self) -> str:
        """All attempts share the file."""
        return ""

    @property
    def save_dir(self) -> str:
        """Where it lies."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line."""
        if not self._opened:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_half_line(self.path)
            self._opened = True
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, **values}, ensure_ascii=False) + "\n"
        # Unbuffered: what has been logged is the operating system's.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings lie in the stage's config.yaml."""


class LoggedBeforeSaved(Callback):
    """Writes a step's metrics to the metrics file before a checkpoint holds the step.

    Lightning logs a step behind the hook in which it is saved. Killed in between, a run would go on behind a step whose
    metrics are nowhere.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the row that Lightning is about to log; it will be the same and stand below."""
        # The trainer's public `logged_metrics` would mix in those of the last validation.
        results = trainer._results
        if not trainer.training or results is None:
            return
        row = convert_tensors_to_scalars(results.metrics(on_step=True)["log"])
        # Where a step has begun that was not taken, some of the row is that step's.
        if row.pop("step", None) != trainer.global_step:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.log_metrics(row, trainer.global_step)


def _cut_half_line(path: Path) -> None:
    """A machine that went down may have left a line without its end; the next one shall not join it."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
