"""What a stage's metrics go to: the file in its folder always, and the configured loggers beside it."""

from __future__ import annotations

import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from ivl_lightning.config.schema import RunConfig
from ivl_lightning.launch.metrics_file import MetricsFile

WANDB_ID_NAME = "wandb_id.txt"


def build_loggers(config: RunConfig, folder: Path) -> list[Logger]:
    """The configured loggers and the metrics file; a logger of W&B goes on with the run that the stage began."""
    entries = [entry for entry in config.logger.values() if entry is not None]
    return [*(instantiate(_continued(entry, folder)) for entry in entries), MetricsFile(folder)]


def log_settings(config: RunConfig, trainer: L.Trainer) -> None:
    """Tell the loggers the stage's settings, as plain nested values."""
    for logger in trainer.loggers:
        logger.log_hyperparams(asdict(config))


def _continued(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    if entry["_target_"].rpartition(".")[2] != "WandbLogger" or entry.get("id") is not None:
        return entry
    return {**entry, "id": _wandb_id(folder / WANDB_ID_NAME), "resume": "allow"}


def _wandb_id(path: Path) -> str:
    """Kept beside the stage's results; ranks but the first, which log nothing, may come too early for it.

    An agent of W&B knows its run beforehand and waits for metrics under that id.
    """
    _draw_id(path)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@rank_zero_only
def _draw_id(path: Path) -> None:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
