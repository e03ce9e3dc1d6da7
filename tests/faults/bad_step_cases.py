"""Runs that meet a sample whose loss is no number, and their steps again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from hydra import initialize_config_module
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from ivl_lightning.callbacks.gradient_guard import NonFiniteError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.replay import write_replay
from ivl_lightning.launch.run_stage import run_stage, write_config

STAGE = "instruction_tuning"


class Recorder(Callback):
    """Bits of the gradients, samples and losses of each step that is taken, and of the weights behind it."""

    taken: ClassVar[dict[int, dict[str, Any]]] = {}
    stopped: ClassVar[int | None] = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        if batch.planned.micro_step == 0:
            self.samples: list[str] = []
            self.losses: list[float] = []
        self.samples += batch.sample_ids

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.losses.append(float(loss.detach()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.gradients = bits(parameter.grad for parameter in pl_module.root.parameters())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if batch.planned.micro_step + 1 == batch.planned.num_micro_steps:
            self.taken[trainer.global_step - 1] = {
                "gradients": self.gradients,
                "losses": self.losses,
                "norm": float(trainer.callback_metrics["train/grad_norm"]),
                "samples": self.samples,
                "weights": bits(pl_module.root.parameters()),
            }

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        type(self).stopped = bits(pl_module.root.parameters())


def bits(tensors: Any) -> int:
    """Sum of all tensors' bits, taken as integers; every rank must call it."""
    whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in whole)


def compose(arguments: list[str], run_dir: Path) -> RunConfig:
    overrides = [argument for argument in arguments if not argument.startswith("stages=")]
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        return compose_stage(STAGE, overrides, run_dir=str(run_dir))


def train(config: RunConfig) -> dict[str, Any]:
    """Train in this process until the run ends or stops; what the recorder saw, and the error."""
    Recorder.taken, Recorder.stopped = {}, None
    folder = Path(config.run_dir) / STAGE
    if is_first():
        write_config(config, folder)
    wait()
    error = ""
    try:
        run_stage(folder)
    except NonFiniteError as stop:
        error = str(stop)
    return {"taken": dict(Recorder.taken), "stopped": Recorder.stopped, "error": error}


def replay(config: RunConfig, step: int) -> Path:
    """Run a step again in this process; returns the replay's folder."""
    folder = Path(config.run_dir) / STAGE / "replay" / f"step={step:08d}"
    if is_first():
        assert write_replay({STAGE: replace(config, replay=step)}) == folder
    wait()
    run_stage(folder)
    return folder


def is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
