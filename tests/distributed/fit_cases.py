"""Run by torchrun: trains the tiny model under each case and writes losses and first gradients. Started once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from ivl_lightning.config.schema import OptimConfig, StrategyConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mlp_warmup import MLPWarmup
from ivl_lightning.strategies.build import build_strategy
from tests import tiny

STEPS = 3


class Recorder(Callback):
    """Losses of every step, and all gradients of the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.validation: float = float("nan")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self.gradients:
            return
        for name, parameter in pl_module.root.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                self.gradients[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if batch.planned.micro_step + 1 == batch.planned.num_micro_steps:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit(
    meta: Path,
    strategy: str,
    world_size: int,
    *,
    reduction: str,
    normaliser: str,
    stage: str,
    keep_in: Path,
    resume_from: Path | None,
    batch_samples: int | None,
) -> dict[str, Any]:
    """Train a few steps; the same seeds whatever the layout. The state behind each step is kept (not under FSDP)."""
    tokenizer = tiny.load_tiny_tokenizer()
    stage_class = {"instruction_tuning": InstructionTuning, "mlp_warmup": MLPWarmup}[stage]
    module = stage_class(
        lambda: tiny.build_tiny_model(tokenizer),
        loss=NextTokenLoss(reduction, normaliser),
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0),
        generation_tokens=4,
    )
    config = tiny.tiny_data_config(meta, max_tokens=420, max_pack_tiles=8, val_rows=5, batch_samples=batch_samples)
    data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    recorder = Recorder()
    keep = ModelCheckpoint(dirpath=keep_in, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    keeps = strategy != "fsdp" and resume_from is None
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=build_strategy(StrategyConfig(name=strategy), num_ranks=world_size),
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=keeps,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0,
        callbacks=[recorder, keep] if keeps else [recorder],
    )
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    metrics = trainer.validate(module, data, verbose=False)[0]
    return {"losses": recorder.losses, "gradients": recorder.gradients, "validation": metrics}


def main() -> None:
    meta, out, world_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    results = {}
    for case in sys.argv[4:]:
        strategy, stage, reduction, rule = case.split("/")
        # "resumeN" goes on behind the first step of N ranks.
        ranks = rule.removeprefix("resume") if rule.startswith("resume") else None
        # "batchN" makes steps of N rows.
        batch = int(rule.removeprefix("batch")) if rule.startswith("batch") else None
        rule = rule if ranks is None else "step"
        folder = f"{stage}-{reduction}-{rule}"
        results[case] = fit(
            meta,
            strategy,
            world_size,
            reduction=reduction,
            normaliser=rule if batch is None else "step",
            stage=stage,
            keep_in=out.parent / f"{folder}-{world_size}",
            resume_from=None if ranks is None else out.parent / f"{folder}-{ranks}" / "step=1.ckpt",
            batch_samples=batch,
        )
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main()
