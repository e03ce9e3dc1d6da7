"""A Lightning Trainer from the typed settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger

from ivl_lightning.config.schema import RunConfig
from ivl_lightning.data.plan import accumulation
from ivl_lightning.strategies.build import build_strategy

CHECKPOINT_FOLDER = "checkpoints"
# Lightning has no "never": an interval no run reaches keeps validation to the end of the stage.
_NEVER = 10**12


def build_trainer(config: RunConfig, folder: Path, callbacks: Sequence[Callback] = ()) -> L.Trainer:
    """The trainer of one stage; its files go to `folder`, `callbacks` come before the configured ones."""
    settings = config.trainer
    num_ranks = settings.devices * settings.num_nodes
    micro_steps = accumulation(config.data.packs_per_step, num_ranks)
    every = settings.val_every_n_steps
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=build_strategy(config.strategy, num_ranks=num_ranks),
        precision=settings.precision,
        max_steps=settings.max_steps or -1,
        max_epochs=-1 if settings.max_steps else settings.max_epochs,
        gradient_clip_val=settings.gradient_clip_val,
        val_check_interval=_NEVER if every is None else every * micro_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=settings.log_every_n_steps,
        enable_progress_bar=settings.progress_bar,
        enable_model_summary=False,
        deterministic=settings.deterministic,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=build_loggers(config),
        callbacks=[*callbacks, *build_callbacks(config, folder)],
    )


def build_loggers(config: RunConfig) -> list[Logger] | bool:
    """The configured loggers; False where there are none."""
    return [instantiate(entry) for entry in config.logger.values() if entry is not None] or False


def build_callbacks(config: RunConfig, folder: Path) -> list[Callback]:
    """Checkpoints, learning rates, and the configured callbacks."""
    callbacks: list[Callback] = [instantiate(entry) for entry in config.callbacks.values() if entry is not None]
    if not config.trainer.progress_bar:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    if config.logger:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    return [*callbacks, _checkpoints(config, folder)]


def _checkpoints(config: RunConfig, folder: Path) -> ModelCheckpoint:
    every = config.trainer.checkpoint_every_n_steps
    options: dict[str, Any] = (
        {"save_top_k": 0}
        if every is None
        else {
            "save_top_k": config.trainer.keep_checkpoints,
            "every_n_train_steps": every,
            "monitor": "step",
            "mode": "max",
        }
    )
    return ModelCheckpoint(dirpath=folder / CHECKPOINT_FOLDER, filename="{step:08d}", **options)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps, from which a killed stage goes on."""
    found = sorted((folder / CHECKPOINT_FOLDER).glob("step=*.ckpt"))
    return found[-1] if found else None
