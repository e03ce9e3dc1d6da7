"""A Lightning Trainer from the typed settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar

from ivl_lightning.checkpoints.complete import newest_complete
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import CHECKPOINTS_FOLDER
from ivl_lightning.data.plan import accumulation
from ivl_lightning.launch.loggers import build_loggers
from ivl_lightning.launch.metrics_file import LoggedBeforeSaved
from ivl_lightning.strategies.build import build_strategy

# Lightning has no "never": an interval no run reaches keeps validation to the end of the stage.
_NEVER = 10**12


def build_trainer(config: RunConfig, folder: Path, callbacks: Sequence[Callback] = ()) -> L.Trainer:
    """The trainer of one stage; its files go to `folder`, `callbacks` come before the configured ones."""
    settings = config.trainer
    num_ranks = settings.devices * settings.num_nodes
    micro_steps = accumulation(config.data.packs_per_step, num_ranks)
    every = settings.val_every_n_steps
    strategy = build_strategy(
        config.strategy, num_ranks=num_ranks, num_nodes=settings.num_nodes, accelerator=settings.accelerator
    )
    strategy.save_behind = settings.async_checkpoints
    everyone = [*callbacks, *build_callbacks(config), LoggedBeforeSaved()]
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        plugins=[cluster_environment()],
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
        # Else Lightning would add a saver of its own.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in everyone),
        deterministic=settings.deterministic,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=build_loggers(config, folder),
        callbacks=everyone,
    )


def cluster_environment() -> ClusterEnvironment:
    """Who has started the ranks: the launching processes (see `launch.ranks`), or Lightning does so itself.

    Lightning's own choice would take a script of sbatch for a step of srun; and its environment of Slurm has handlers
    that save in the middle of a batch, which cannot be resumed exactly.
    """
    return TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()


def build_callbacks(config: RunConfig) -> list[Callback]:
    """The configured callbacks."""
    callbacks: list[Callback] = [instantiate(entry) for entry in config.callbacks.values() if entry is not None]
    if config.trainer.progress_bar:
        return callbacks
    return [callback for callback in callbacks if not isinstance(callback, ProgressBar)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps, from which a stage goes on that was killed or stopped."""
    return newest_complete(folder / CHECKPOINTS_FOLDER)
