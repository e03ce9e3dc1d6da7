"""Training of the tiny model under one case: losses, gradients and validation. `layout_cases` starts it on many ranks.

A case is `strategy/stage/reduction/rule`. The rule is a normaliser (`step`, `micro_batch`), or with the normaliser
`step`: `batchN` makes steps of N rows, `packs8` of 8 packs, their head in chunks of two rows, `clip` clips gradients,
`ema` averages weights; `sync8` (8 packs too), `offload`, `prefetch`, `compile` are switches of the strategy. `resumeN`
goes on behind the first step of N ranks, and `emaresumeN` behind one with averages. With `square` and a rule of `step`,
`ema` or one that goes on, a probe set is asked in each step.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ivl_lightning.callbacks.ema import EMA
from ivl_lightning.callbacks.sample_cards import SampleCards
from ivl_lightning.checkpoints.weights import full_state_dict
from ivl_lightning.config.schema import EvalConfig, OptimConfig, StrategyConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.sample_file import SAMPLES_NAME, read_cards
from ivl_lightning.losses.next_token import NORMALISERS, NextTokenLoss
from ivl_lightning.stages.answer_scores import AnswerScores
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mlp_warmup import MLPWarmup
from ivl_lightning.strategies.build import build_strategy
from ivl_lightning.structures import Answer, Record
from tests import tiny

STEPS = 3
EIGHT_PACKS = ("packs8", "sync8")
UNVALIDATED = ("clip", "packs8", "sync8", "micro_batch", "compile")
CLIP = 0.05
EMA_DECAY = 0.15
TILE_LIMITS = (1, 4)
STAGES = {"instruction_tuning": InstructionTuning, "mlp_warmup": MLPWarmup}


class Recorder(Callback):
    """Losses of every step, and all gradients of the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.validation: float = float("nan")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = gradients_of(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if batch.planned.micro_step + 1 == batch.planned.num_micro_steps:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


class LayoutRecorder(Recorder):
    """Besides: gradients as the last step took them, this rank's labels in each step, and perhaps the weights.

    Args:
        weights: keep them as they were before the first step and behind each one, whole.
    """

    def __init__(self, *, weights: bool = False) -> None:
        super().__init__()
        self.labels: list[int] = []
        self.last_gradients: dict[str, Tensor] = {}
        self.weights: list[dict[str, Tensor]] = []
        self._keeps_weights = weights

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._keeps_weights:
            self.weights.append(weights_of(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, *rest)
        if batch.planned.micro_step == 0:
            self.labels.append(0)
        self.labels[-1] += len(batch.loss_targets)
        if trainer.global_step == trainer.max_steps:
            self.last_gradients = gradients_of(pl_module)
        if self._keeps_weights and len(self.weights) == len(self.losses):
            self.weights.append(weights_of(pl_module))


class Collectives(TorchDispatchMode):
    """Counts what is sent between ranks, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def gradients_of(module: L.LightningModule) -> dict[str, Tensor]:
    """Whole, by name; every rank must ask for them."""
    grads = {name: parameter.grad for name, parameter in module.root.named_parameters()}
    return {
        name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        for name, grad in grads.items()
        if grad is not None
    }


def weights_of(module: L.LightningModule) -> dict[str, Tensor]:
    """Whole, by name; every rank must ask for them."""
    return {name: value.clone() for name, value in full_state_dict(module.root).items()}


def gathered(value: Any) -> list[Any]:
    """The value of each rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def nodes_of(world_size: int) -> tuple[int, int]:
    """Ranks of each node and nodes, as whoever started this rank has it."""
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size > 1 else 1
    return devices, world_size // devices


def sharding(strategy: str, rule: str = "step") -> StrategyConfig:
    return StrategyConfig(
        name=strategy,
        sync_every_micro_batch=rule == "sync8",
        compile_blocks=rule == "compile",
        cpu_offload=rule == "offload",
        prefetch=2 if rule == "prefetch" else 0,
        reshard_after_forward=rule != "prefetch",
        timeout_minutes=2,
    )


def stage_of(stage: str, reduction: str, rule: str, settings: StrategyConfig) -> InstructionTuning | MLPWarmup:
    tokenizer = tiny.load_tiny_tokenizer()
    return STAGES[stage](
        lambda: tiny.build_tiny_model(tokenizer),
        loss=NextTokenLoss(
            reduction, rule if rule in NORMALISERS else "step", chunk_rows=2 if rule in EIGHT_PACKS else 4096
        ),
        # With such an eps a step is a multiple of the gradient, nearly. Adam's own divides rounding by rounding.
        optim=OptimConfig(lr=0.3, eps=1.0, schedule="constant", warmup_steps=0),
        generation_tokens=4,
        evaluation=EvalConfig(metrics={"pictures": "anls"}),
        sharding=settings,
    )


def data_of(meta: Path, rule: str) -> DynamicPackingDataModule:
    config = tiny.tiny_data_config(
        meta,
        max_tokens=420,
        max_pack_tiles=8,
        val_rows=5,
        packs_per_step=8 if rule in EIGHT_PACKS else 4,
        batch_samples=int(rule.removeprefix("batch")) if rule.startswith("batch") else None,
    )
    return DynamicPackingDataModule(
        config, tiny.load_tiny_tokenizer(), patch_size=tiny.PATCH_SIZE, tile_limits=TILE_LIMITS
    )


def scores_at_limits(trainer: L.Trainer, module: L.LightningModule, data: DynamicPackingDataModule) -> dict[str, Any]:
    """What the network answers at each tile limit."""
    trainer.test(module, data, verbose=False)
    return {str(limit): scores for limit, scores in module.tile_scores.items()}


def scores_of_shares(rank: int, world_size: int) -> dict[str, float]:
    """Scores of six answers that are dealt to the ranks; every rank must ask for them."""
    scores = AnswerScores()
    scores.add("votes", "vqa_score")
    scores.add("words", "exact_match")
    truths = ("a cat", "dog", "cat.", "bird", *map(str, range(6)))
    given = [("votes", "cat"), ("votes", "bird"), ("words", "a cat"), ("words", "b"), ("words", "bird"), ("words", "4")]
    scores.update(
        [
            Answer(Record(dataset, "", 1, {}), "", "", truths, text, tokens, tokens > 4, prompt_tokens=1, tiles=0)
            for tokens, (dataset, text) in enumerate(given)
        ][rank::world_size]
    )
    return {name: float(value) for name, value in scores.compute().items()}


def fit(meta: Path, out: Path, case: str, world_size: int) -> dict[str, Any]:
    """Train three steps, or one of 8 packs; the same seeds whatever the layout. Some keep the state behind each step.

    Args:
        meta: the data.
        out: where checkpoints go, and are found.
        case: see the module.
        world_size: ranks that run this.
    """
    strategy, stage, reduction, rule = case.split("/")
    # A resumed run goes on from a checkpoint of another number of ranks.
    kind, _, ranks = rule.partition("resume")
    kind, resumes, averages = kind or "step", bool(ranks), kind == "ema"
    settings, (devices, num_nodes) = sharding(strategy, kind), nodes_of(world_size)
    module, data = stage_of(stage, reduction, kind, settings), data_of(meta, kind)
    recorder = LayoutRecorder(weights=averages and strategy == "single" and not resumes)
    folder = out / f"{stage}-{reduction}-{kind}-{ranks or world_size}"
    keeps = rule in ("step", "ema") and strategy in ("single", "ddp")
    asks = (stage, reduction) == ("instruction_tuning", "square") and kind in ("step", "ema")
    cards = SampleCards(str(out / f"cards-{strategy}-{rule}-{world_size}"), rows=5, every_n_steps=1)
    keep = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=build_strategy(settings, num_ranks=world_size, num_nodes=num_nodes),
        max_steps=1 if kind in EIGHT_PACKS else STEPS,
        gradient_clip_val=CLIP if kind == "clip" else None,
        logger=False,
        enable_checkpointing=keeps,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0,
        default_root_dir=out,
        callbacks=[
            recorder,
            *([keep] if keeps else []),
            *([EMA(EMA_DECAY)] if averages else []),
            *([cards] if asks else []),
        ],
    )
    sent = Collectives()
    with sent if kind in EIGHT_PACKS or stage == "mlp_warmup" else nullcontext():
        trainer.fit(module, data, ckpt_path=folder / "step=1.ckpt" if resumes else None, weights_only=True)
    return {
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "last_gradients": recorder.last_gradients,
        "labels": gathered(recorder.labels),
        "calls": dict(sent.calls),
        "trajectory": recorder.weights,
        "weights": weights_of(module) if averages else {},
        "validation": {} if kind in UNVALIDATED else trainer.validate(module, data, verbose=False)[0],
        "limits": scores_at_limits(trainer, module, data) if rule == "step" and reduction == "square" else {},
        "shares": scores_of_shares(trainer.global_rank, world_size),
        "cards": [
            [card.step, card.dataset, card.line, card.generated] for card in read_cards(cards.folder / SAMPLES_NAME)
        ],
    }
