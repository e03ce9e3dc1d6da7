"""What every stage does: build, freeze, shard, optimize, and score generated answers in validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeAlias

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich import print as rich_print
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torchmetrics import MeanMetric
from transformers import InternVLForConditionalGeneration

from ivl_lightning.checkpoints.lora import merged_state_dict
from ivl_lightning.config.lora import trained_parts
from ivl_lightning.config.schema import LoraSettings, OptimConfig, Part, StrategyConfig
from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.inference.answers import decode_answers
from ivl_lightning.metrics.exact_match import ExactMatch
from ivl_lightning.models.build import enable_activation_checkpointing
from ivl_lightning.models.drop_path import apply_drop_path
from ivl_lightning.models.freeze import frozen_modules, model_parts, part_sizes, set_trainable
from ivl_lightning.models.last_layer import select_in_last_layer
from ivl_lightning.models.loader import NetworkLoader, ReadyNetwork
from ivl_lightning.models.lora import add_lora, freeze_adapted, lora_scale
from ivl_lightning.models.parts import vision_layers, vision_tower
from ivl_lightning.models.quantize import four_bit_names, quantize_language_model, unquantized
from ivl_lightning.models.shard import compile_blocks, reshard, shard_model
from ivl_lightning.models.streaming import is_empty, materialise
from ivl_lightning.optim.adamw import AdamW
from ivl_lightning.optim.param_groups import parameter_groups
from ivl_lightning.optim.schedule import WarmupSchedule
from ivl_lightning.stages.frozen_base import FrozenBase
from ivl_lightning.stages.root import InternVLRoot
from ivl_lightning.stages.tables import trainable_table
from ivl_lightning.structures import Answer, PackedBatch, PlannedPack, PreferenceBatch, PromptBatch

NETWORK_CONFIG = "internvl_config"
"""Entry of a checkpoint: configuration of the network whose weights it holds."""

ModelSource: TypeAlias = (
    InternVLForConditionalGeneration | Callable[[], InternVLForConditionalGeneration] | NetworkLoader
)


class Stage(L.LightningModule):
    """A stage of training; a subclass adds its loss.

    Args:
        model: the network, or a function or loader that builds it, once the strategy is set up.
        optim: optimizer and schedule.
        trainable: parts that train; by default those with adapters, or the stage's own choice.
        trainable_vision_layers: of a trainable tower only the last n layers.
        drop_path_rate: stochastic depth of the vision tower.
        activation_checkpointing: recompute each block in backward.
        generation_tokens: most tokens of an answer.
        sharding: dtype and resharding under FSDP.
        lora: adapters that train in place of a part's weights.
        seed: of the adapters' first values, and of dropout and drop path.

    Attributes:
        resumed: for whoever will give the trainer a checkpoint of this stage: weights that it holds are not read
            before. False by default.
        awaits_checkpoint: the network's weights are still those that lay in memory by chance.
        averaged: what the weights are an average of, for people, if a callback has put one in their place.
        sample_losses: `[D]`, of each sample of the last training micro-batch, without gradient: the mean loss of its
            labels, or of a pair the weighted sum of its terms. For callbacks.

    Raises:
        ValueError: `trainable` leaves out a part with adapters; or a ready network that is to be quantized.
    """

    default_trainable: ClassVar[tuple[Part, ...]]

    def __init__(
        self,
        model: ModelSource,
        *,
        optim: OptimConfig | None = None,
        trainable: list[Part] | None = None,
        trainable_vision_layers: int | None = None,
        drop_path_rate: float = 0.0,
        activation_checkpointing: bool = False,
        generation_tokens: int = 32,
        sharding: StrategyConfig | None = None,
        lora: LoraSettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.loader = model if isinstance(model, NetworkLoader) else ReadyNetwork(model)
        self.optim = optim or OptimConfig()
        self._builds_anew = self.loader.builds_anew
        self.lora = lora or LoraSettings()
        if self.lora.quantize is not None and not self._builds_anew:
            raise ValueError(
                f"lora.quantize={self.lora.quantize} with a ready network: give a function that builds it, because the "
                "merged weights are made of those it had before"
            )
        self.seed = seed
        self.trainable = trained_parts(trainable, self.lora, self.default_trainable)
        self.trainable_vision_layers = trainable_vision_layers
        self.drop_path_rate = drop_path_rate
        self.activation_checkpointing = activation_checkpointing
        self.generation_tokens = generation_tokens
        self.sharding = sharding or StrategyConfig()
        self.resumed = self.awaits_checkpoint = False
        self.averaged: str | None = None
        self.root: InternVLRoot | None = None
        self._frozen_base: FrozenBase | None = None
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

    @property
    def internvl(self) -> InternVLForConditionalGeneration:
        """The network. Only its root may run it; others may read its configuration or save it."""
        assert self.root is not None, "configure_model has not run yet"
        return self.root.internvl

    @property
    def trained_names(self) -> list[str]:
        """Parts that train, for people: `llm`, or `llm (LoRA)` where adapters do."""
        return [f"{part} (LoRA)" if part in self.lora.parts else part for part in self.trainable]

    # -- building -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build, freeze, wrap and shard; called by Lightning once devices are known, or by hand without a trainer."""
        if self.root is not None:
            return
        model = self._build()
        apply_drop_path(vision_tower(model), self.drop_path_rate)
        set_trainable(model, self.trainable, last_vision_layers=self.trainable_vision_layers)
        self._adapt(model)
        if self.activation_checkpointing:
            enable_activation_checkpointing(model)
        self.root = self._wrap(model)
        if self._frozen_base is not None:
            self._frozen_base.attach(self, "root.internvl")
        self._shard(self.root)
        if is_empty(model):
            self._fill(self.root, read=not self._checkpoint_has_all)
        if self._frozen_base is not None and self.lora.quantize is None:
            self._frozen_base.take(model)
        self.train()

    def _build(self) -> InternVLForConditionalGeneration:
        """The network; on the meta device if it is read from somewhere, and not quantized before it is sharded."""
        model = self.loader.build()
        select_in_last_layer(model)
        if not is_empty(model) or self.lora.quantize is not None:
            self.loader.fill(model)
        return model

    @property
    def _checkpoint_has_all(self) -> bool:
        """Whether the weights of this stage's network will come from a checkpoint, to the last one."""
        return self.resumed and not self.lora.parts

    @property
    def reads_origins(self) -> bool:
        """Whether where the network is from is read; a stage that goes on from a checkpoint may have all it needs."""
        return not self._checkpoint_has_all

    def _fill(self, root: InternVLRoot, *, read: bool = True) -> None:
        """Give a network on the meta device memory, and its weights; of a sharded one each rank its own shares."""
        attached = self._trainer is not None
        if self.device_mesh is not None:
            offloaded = self.sharding.cpu_offload or not attached
            materialise(root, self.device if offloaded else self.trainer.strategy.root_device)
        if read:
            self.loader.fill(root.internvl)
        else:
            self.awaits_checkpoint = True
            materialise(root, torch.device("cpu"))

    def _whole_network(self) -> InternVLForConditionalGeneration:
        """The network the stage began with, once more, not sharded."""
        model = self.loader.build()
        self.loader.fill(model)
        return model

    def _adapt(self, model: InternVLForConditionalGeneration) -> None:
        """Freeze what gets adapters, quantize it if wanted, and add them; nothing without LoRA."""
        if not self.lora.parts:
            return
        freeze_adapted(model, self.lora)
        self._frozen_base = FrozenBase(name for name, value in model.named_parameters() if not value.requires_grad)
        if self.lora.quantize is not None:
            self._frozen_base.take(model)
            self._quantize(model)
        add_lora(model, self.lora, seed=self.seed)

    def _quantize(self, model: InternVLForConditionalGeneration) -> None:
        """Put the language model's blocks into 4 bits, if wanted."""
        if self.lora.quantize is not None:
            attached = self._trainer is not None
            quantize_language_model(model, self.trainer.strategy.root_device if attached else self.device)

    def merged(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the plain network that the adapted one stands for; of 4-bit weights those they were made of.

        Args:
            state_dict: whole, of `internvl`; used up.

        Raises:
            ValueError: weights that were in 4 bits cannot be read again.
        """
        if self.lora.quantize is not None:
            plain = self._whole_network().state_dict()
            assert self._frozen_base is not None
            self._frozen_base.check_tensors({name: plain[name] for name in four_bit_names(state_dict).values()})
            state_dict = unquantized(state_dict, plain)
        return merged_state_dict(state_dict, lora_scale(self.lora)) if self.lora.parts else state_dict

    def _wrap(self, model: InternVLForConditionalGeneration) -> InternVLRoot:
        """The root module whose forward gives what this stage's loss needs."""
        raise NotImplementedError

    def _shard(self, root: InternVLRoot) -> None:
        """Compile a root's blocks, if wanted, and shard it under FSDP."""
        settings, mesh = self.sharding, self.device_mesh
        if settings.compile_blocks:
            compile_blocks(root.internvl)
        if mesh is None:
            return
        shard_model(
            root,
            root.internvl,
            mesh,
            param_dtype=getattr(torch, settings.param_dtype),
            reshard_after_forward=settings.reshard_after_forward,
            cpu_offload=settings.cpu_offload,
            prefetch=settings.prefetch,
        )
        register_fsdp_forward_method(root, "generate")

    def _always_run_vision(self) -> bool:
        """Whether a micro-batch without a tile runs the tower all the same.

        Sharded ranks must gather the same weights. And what trains must get a gradient of zero rather than none,
        on one process as on many: the optimizer skips a parameter without a gradient, so layouts would differ.
        """
        return self.device_mesh is not None or "vision" in self.trainable or "projector" in self.trainable

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

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in eval mode: no drop path where nothing learns."""
        super().train(mode)
        if mode and self.root is not None:
            for module in frozen_modules(self.root.internvl):
                module.eval()
        return self

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
