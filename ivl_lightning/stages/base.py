"""What every stage does: build, freeze, shard, optimize, and score generated answers in validation."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich import print as rich_print
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MeanMetric

from ivl_lightning.config.schema import OptimConfig
from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.models.freeze import model_parts, part_sizes
from ivl_lightning.models.parts import vision_layers, vision_tower
from ivl_lightning.optim.adamw import AdamW
from ivl_lightning.optim.param_groups import parameter_groups
from ivl_lightning.optim.schedule import WarmupSchedule
from ivl_lightning.stages.answering import AnsweringStage
from ivl_lightning.stages.frozen_base import FrozenBase
from ivl_lightning.stages.logged_numbers import log_numbers
from ivl_lightning.stages.network import ModelSource
from ivl_lightning.stages.tables import trainable_table
from ivl_lightning.structures import PackedBatch, PlannedPack, PreferenceBatch

NETWORK_CONFIG = "internvl_config"
"""Entry of a checkpoint: configuration of the network whose weights it holds."""


class Stage(AnsweringStage):
    """A stage of training; a subclass adds its loss.

    Args:
        model: see `NetworkStage`.
        optim: optimizer and schedule.
        **options: see `AnsweringStage`.

    Attributes:
        averaged: what the weights are an average of, for people, if a callback has put one in their place.
        sample_losses: `[D]`, of each sample of the last training micro-batch, without gradient: the mean loss of its
            labels, or of a pair the weighted sum of its terms. For callbacks.
    """

    def __init__(self, model: ModelSource, *, optim: OptimConfig | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.optim = optim or OptimConfig()
        self.averaged: str | None = None
        self.val_loss = MeanMetric()
        self.progress = 0.0
        self._step_sums: Tensor | None = None
        self._broken = 0
        self._trained: PackedBatch | PreferenceBatch | None = None
        self.sample_losses: Tensor | None = None

    @property
    def reduction(self) -> str:
        """Reweighting rule; the data module weighs and plans by it."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Show what trains."""
        if self.trainer.is_global_zero:
            rich_print(trainable_table(type(self).__name__, part_sizes(self.internvl)))

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Lightning leaves the modes as they were; a resumed or reused module may be in eval mode.

        Raises:
            ValueError: the checkpoint that was to bring the weights was not loaded.
        """
        if self.awaits_checkpoint:
            raise ValueError(
                "the stage was told that it is resumed, so its weights were not read, but no checkpoint was loaded: "
                "give ckpt_path, or leave stage.resumed as it is"
            )
        self.train()
        self._align_batch_count()

    def _align_batch_count(self) -> None:
        """Make Lightning count the finished steps in micro-batches of this layout.

        It steps the optimizer at each multiple of the accumulation, and a checkpoint holds a count of the layout that
        saved it: 3 steps of 4 ranks are 3 micro-batches, continued on one rank they are 12. One that was saved on an
        exception also counts the micro-batches of the step that failed, which is made anew.
        """
        steps = datamodule_of(self.trainer).stream.position.steps
        loop = self.trainer.fit_loop.epoch_loop
        # At the end of a batch Lightning saves before it counts the batch as completed, and makes up for it on restart.
        uncounted = int(loop.restarted_on_train_batch_end)
        progress, micro_steps = loop.batch_progress, self.trainer.accumulate_grad_batches
        for counter, finished in ((progress.current, steps), (progress.total, self.trainer.global_step)):
            for name in ("ready", "started", "processed"):
                setattr(counter, name, finished * micro_steps)
            counter.completed = finished * micro_steps - uncounted

    def on_train_batch_start(self, batch: PackedBatch | PreferenceBatch, batch_idx: int) -> None:
        """Random numbers follow from the rows; gradients travel between copies with a step's last micro-batch alone.

        So they do between shards of a copy, unless `sync_every_micro_batch` saves their memory. DDP does it by itself.
        """
        planned = batch.planned
        if planned.micro_step == 0:
            self._log_place()
        torch.manual_seed(_seed_of(self.seed, planned))
        if isinstance(self.root, FSDPModule):
            last = planned.micro_step + 1 == planned.num_micro_steps
            self.root.set_requires_gradient_sync(last or self.sharding.sync_every_micro_batch)
            self.root.set_requires_all_reduce(last)

    def _log_place(self) -> None:
        """Log the learning rates of a step that begins, and its number for the axis of all charts.

        Lightning takes a metric called `step` for the axis. It is the number of finished steps once this one is logged;
        Lightning's own counts from 0, but behind the fit from 1.
        """
        rates = {f"lr/{group['name']}": group["lr"] for group in self.trainer.optimizers[0].param_groups}
        log_numbers(self, {"step": self.trainer.global_step + 1, "epoch": self.trainer.current_epoch, **rates})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say of which network it is; with adapters, beside which frozen weights they were trained."""
        checkpoint[NETWORK_CONFIG] = json.loads(self.internvl.config.to_json_string(use_diff=False))
        if self._frozen_base is not None:
            self._frozen_base.note(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapters go on beside the frozen weights they were trained with.

        Raises:
            ValueError: the frozen weights at hand are others.
        """
        self.awaits_checkpoint = False
        FrozenBase.check(checkpoint, self._frozen_base)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; then the position in the data moves with the weights.

        Training steps leave their batch in `_trained`.
        """
        super().optimizer_step(*args, **kwargs)
        if self._trained is not None:
            datamodule_of(self.trainer).note_trained(self._trained)

    def _reduced(self, sums: Tensor, batch: PackedBatch | PreferenceBatch) -> Tensor | None:
        """Add up sums over the step's micro-batches; with its last one, over the ranks too.

        Rows that broke travel along, so that all ranks know how many there are and stop together.

        Args:
            sums: `[n]` of this micro-batch.
            batch: the micro-batch.

        Returns:
            `[n]` of the whole step, or None before its last micro-batch.
        """
        planned, datamodule = batch.planned, datamodule_of(self.trainer)
        self._broken += datamodule.note_rejects(batch.rejects)
        self._step_sums = sums if planned.micro_step == 0 or self._step_sums is None else self._step_sums + sums
        if planned.micro_step + 1 < planned.num_micro_steps:
            return None
        own = torch.cat([self._step_sums, self._step_sums.new_tensor([self._broken])])
        total = self.trainer.strategy.reduce(own, reduce_op="sum")
        datamodule.note_rejects_elsewhere(int(total[-1]) - self._broken)
        self._step_sums, self._broken = None, 0
        return total[:-1]

    def _share_of_run(self, consumed: float) -> float:
        """Of the steps where `max_steps` ends the run, else of the samples."""
        max_steps = self.trainer.max_steps
        return consumed if max_steps == -1 else min((self.trainer.global_step + 1) / max_steps, 1.0)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the trainable parameters, by part, with warm-up and cosine."""
        optim = self.optim
        parts = model_parts(self.internvl)
        named: dict[str, list[tuple[str, nn.Parameter]]] = {
            part: [item for module in modules for item in module.named_parameters()] for part, modules in parts.items()
        }
        groups = parameter_groups(
            named,
            lr={part: _chosen(optim.lr_by_part.get(part), optim.lr) for part in parts},
            weight_decay={part: _chosen(optim.weight_decay_by_part.get(part), optim.weight_decay) for part in parts},
            decay=optim.decay,
            vision_layers=len(vision_layers(vision_tower(self.internvl))),
            vision_layer_decay=optim.vision_layer_decay,
        )
        optimizer = AdamW(groups, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)
        max_steps = self.trainer.max_steps
        schedule = WarmupSchedule(
            shape=optim.schedule,
            warmup_steps=optim.warmup_steps,
            warmup_ratio=optim.warmup_ratio,
            max_steps=None if max_steps == -1 else max_steps,
            min_ratio=optim.min_lr_ratio,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, self.progress))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- validation -----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        super().on_validation_epoch_start()
        self.val_loss.reset()

    def _validation_loss(self) -> Tensor:
        return self.val_loss.compute()

    def on_validation_epoch_end(self) -> None:
        """Log the loss, and what answers score."""
        self.log("step", float(self.trainer.global_step), sync_dist=True)
        # The metric has already added up the ranks; averaging equal numbers once more tells Lightning so.
        if datamodule_of(self.trainer).has_val_packs:
            self.log("val/loss", self._validation_loss(), sync_dist=True)
        super().on_validation_epoch_end()


def stage_of(pl_module: L.LightningModule) -> Stage:
    """The trainer's stage.

    Raises:
        ValueError: the trainer trains something else.
    """
    if not isinstance(pl_module, Stage):
        raise ValueError(f"this callback needs one of this project's stages, got {type(pl_module).__name__}")
    return pl_module


def _chosen(own: float | None, common: float) -> float:
    return common if own is None else own


def _seed_of(seed: int, planned: PlannedPack) -> int:
    """Of dropout and drop path in a micro-batch: the same for whoever continues a run, on any number of ranks."""
    key = repr((seed, planned.epoch, planned.step, planned.pack.samples))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
