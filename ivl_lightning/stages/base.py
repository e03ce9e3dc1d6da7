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
from ivl_lightning.inference.answers import decode_answers
from ivl_lightning.metrics.exact_match import ExactMatch
from ivl_lightning.models.freeze import model_parts, part_sizes
from ivl_lightning.models.parts import vision_layers, vision_tower
from ivl_lightning.models.shard import reshard
from ivl_lightning.optim.adamw import AdamW
from ivl_lightning.optim.param_groups import parameter_groups
from ivl_lightning.optim.schedule import WarmupSchedule
from ivl_lightning.stages.frozen_base import FrozenBase
from ivl_lightning.stages.network import ModelSource, NetworkStage
from ivl_lightning.stages.tables import trainable_table
from ivl_lightning.structures import Answer, PackedBatch, PlannedPack, PreferenceBatch, PromptBatch

NETWORK_CONFIG = "internvl_config"
"""Entry of a checkpoint: configuration of the network whose weights it holds."""


class Stage(NetworkStage):
    """A stage of training; a subclass adds its loss.

    Args:
        model: see `NetworkStage`.
        optim: optimizer and schedule.
        generation_tokens: most tokens of an answer.
        **network: see `NetworkStage`.

    Attributes:
        averaged: what the weights are an average of, for people, if a callback has put one in their place.
        sample_losses: `[D]`, of each sample of the last training micro-batch, without gradient: the mean loss of its
            labels, or of a pair the weighted sum of its terms. For callbacks.
    """

    def __init__(
        self, model: ModelSource, *, optim: OptimConfig | None = None, generation_tokens: int = 32, **network: Any
    ) -> None:
        super().__init__(model, **network)
        self.optim = optim or OptimConfig()
        self.generation_tokens = generation_tokens
        self.averaged: str | None = None
        self.val_loss = MeanMetric()
        self.val_scores = nn.ModuleList()
        self._score_names: list[str] = []
        self.progress = 0.0
        self._step_sums: Tensor | None = None
        self._broken = 0
        self._trained: PackedBatch | PreferenceBatch | None = None
        self.sample_losses: Tensor | None = None

    @property
    def reduction(self) -> str:
        """Reweighting rule; the data module weighs and plans by it."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """One score per dataset whose validation rows are answered, on every rank."""
        names = getattr(getattr(self.trainer, "datamodule", None), "answered_datasets", ())
        for name in names:
            if name not in self._score_names:
                # In a list: a dataset's name may hold a point, a module's may not.
                self._score_names.append(name)
                self.val_scores.append(ExactMatch())

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
        torch.manual_seed(_seed_of(self.seed, planned))
        if isinstance(self.root, FSDPModule):
            last = planned.micro_step + 1 == planned.num_micro_steps
            self.root.set_requires_gradient_sync(last or self.sharding.sync_every_micro_batch)
            self.root.set_requires_all_reduce(last)

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
        """Count anew. Here and not at the end: `validate` and `fit` keep tensors of different kinds."""
        self.val_loss.reset()
        for metric in self._scores.values():
            metric.reset()

    def _validation_loss(self) -> Tensor:
        return self.val_loss.compute()

    @property
    def _scores(self) -> dict[str, ExactMatch]:
        scores = zip(self._score_names, self.val_scores, strict=True)
        return {name: metric for name, metric in scores if isinstance(metric, ExactMatch)}

    def _answer_prompts(self, batch: PromptBatch) -> dict[str, list[Answer]]:
        """Answer questions and count what is right; callbacks get the answers."""
        answers = self._answer(batch)
        for answer in answers:
            self._scores[answer.record.dataset].update([answer.generated], [answer.expected])
        return {"answers": answers}

    def _answer(self, batch: PromptBatch) -> list[Answer]:
        assert self.root is not None
        datamodule = datamodule_of(self.trainer)
        # Compiled blocks would be compiled anew for the cache, whose length changes with each token.
        with torch.compiler.set_stance("force_eager" if self.sharding.compile_blocks else "default"):
            tokens = self.root.generate(
                batch,
                max_new_tokens=self.generation_tokens,
                pad_token_id=datamodule.filler_id,
                eos_token_id=datamodule.stop_ids,
                synced_gpus=isinstance(self.root, FSDPModule),
            )
        return decode_answers(tokens, batch, datamodule.tokenizer)

    def on_validation_epoch_end(self) -> None:
        """Log the loss, each dataset's score and their mean."""
        # The metrics have already added up the ranks; averaging equal numbers once more tells Lightning so.
        if datamodule_of(self.trainer).has_val_packs:
            self.log("val/loss", self._validation_loss(), sync_dist=True)
        scores = {name: metric.compute() for name, metric in self._scores.items()}
        for name, score in scores.items():
            self.log(f"val/exact_match/{name}", score, sync_dist=True)
        if scores:
            self.log("val/exact_match", torch.stack(list(scores.values())).mean(), prog_bar=True, sync_dist=True)

    def on_validation_end(self) -> None:
        """Leave nothing gathered: whoever reads parameters next shall find the shares, in the type they are kept in."""
        if self.root is not None:
            reshard(self.root)


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
