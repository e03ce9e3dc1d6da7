"""How fast training is and how much memory it takes, beside what the hardware could do."""

from __future__ import annotations

from typing import Any

import lightning as L
import psutil
import torch

from ivl_lightning.callbacks.step_clock import StepClock
from ivl_lightning.data.ranks import gathered_numbers
from ivl_lightning.models.last_layer import selects_rows
from ivl_lightning.planning.hardware import GB, gpu_named
from ivl_lightning.planning.load import Load
from ivl_lightning.planning.network import TrainedNetwork
from ivl_lightning.planning.work import work_of
from ivl_lightning.stages.base import Stage, stage_of
from ivl_lightning.stages.logged_numbers import log_numbers
from ivl_lightning.stages.mixed_preference import MixedPreference
from ivl_lightning.structures import PackedBatch, PreferenceBatch

_AMOUNTS = 4


class Throughput(StepClock):
    """Logs, per optimizer step, seconds, work and memory, with one collective.

    Metrics: `speed/step_seconds` on the first rank; `speed/tflops`, what the model needs of a rank in a second, in
    10^12 floating-point operations as `ivl-plan` counts them: a frozen part has no backward pass, and what
    checkpointing repeats or padding adds does not count; `speed/mfu`, its share of the device's peak, where that is
    known; `memory/device_gb`, the most that any rank's device held since the last step, on CUDA; `memory/host_gb`, what
    the process of any rank holds now, without its loader workers. A GB is 10^9 bytes.

    Args:
        peak_tflops: of a rank's device, in the type that matrices are multiplied in; by default as its data sheet says.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        super().__init__()
        self._peak = None if peak_tflops is None else peak_tflops * 1e12
        self._step = [0.0] * _AMOUNTS
        self._process = psutil.Process()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PackedBatch | PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """Count a micro-batch; log at the end of a step."""
        self._step = [sum(pair) for pair in zip(self._step, amounts(batch), strict=True)]
        if batch.planned.micro_step + 1 < batch.planned.num_micro_steps:
            return
        stage, device = stage_of(pl_module), trainer.strategy.root_device
        own = [*self._step, _device_memory(device), self._process.memory_info().rss / GB]
        every = gathered_numbers(own, trainer.world_size, device)
        total, (on_device, on_host) = every[:, :_AMOUNTS].sum(dim=0).tolist(), every[:, _AMOUNTS:].amax(dim=0).tolist()
        self._step, seconds = [0.0] * _AMOUNTS, self.lap()
        rate = step_work(stage, total) / (seconds * trainer.world_size)
        peak = self._peak or device_peak(device, bfloat16=computes_in_bfloat16(trainer, stage))
        numbers = {"speed/step_seconds": seconds, "speed/tflops": rate / 1e12, "memory/host_gb": on_host}
        if peak is not None:
            numbers["speed/mfu"] = rate / peak
        if device.type == "cuda":
            numbers["memory/device_gb"] = on_device
        log_numbers(stage, numbers)


def amounts(batch: PackedBatch | PreferenceBatch) -> tuple[float, float, float, float]:
    """Tokens, squared lengths, tiles and supervised rows of a micro-batch; of filler, nothing.

    q queries that end with the last of k keys look at q k - q^2 / 2 of them, which a whole document's square over 2
    stands for; so of an answer that sees its prompt 2 q k - q^2 count.
    """
    if not batch.sample_ids:
        return 0.0, 0.0, 0.0, 0.0
    if isinstance(batch, PreferenceBatch):
        queries, keys = batch.cu_queries.diff().double(), batch.cu_keys.diff().double()
    else:
        queries = keys = batch.cu_seqlens.diff().double()
    squares = (2 * queries * keys - queries**2).sum()
    return float(queries.sum()), float(squares), float(sum(batch.sample_tiles)), float(len(batch.loss_rows))


def step_work(stage: Stage, total: list[float]) -> float:
    """Floating-point operations that a step needs.

    Args:
        stage: what trains in it.
        total: see `amounts`, of the step over all ranks.
    """
    tokens, squares, tiles, labels = total
    adapted = frozenset(stage.lora.parts)
    network = TrainedNetwork(
        shapes=stage.internvl.config,
        full=frozenset(stage.trainable) - adapted,
        adapted=adapted,
        selects_rows=selects_rows(stage.internvl),
    )
    load = Load("batches", None, tokens, squares, tiles, labels, 0.0)
    # Scores of the cached reference are made before the first step.
    reference = isinstance(stage, MixedPreference) and stage.reference != "cached"
    return work_of(network, load, reference=reference).useful


def computes_in_bfloat16(trainer: L.Trainer, stage: Stage) -> bool:
    """In which type matrices are multiplied: FSDP's, autocast's, or that of the weights."""
    if stage.device_mesh is not None:
        return stage.sharding.param_dtype == "bfloat16"
    return trainer.precision == "bf16-mixed" or next(stage.internvl.parameters()).dtype == torch.bfloat16


def device_peak(device: torch.device, *, bfloat16: bool) -> float | None:
    """FLOP/s that a device could do; None where nobody has said so."""
    gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    return gpu.bfloat16 if bfloat16 else gpu.float32


def _device_memory(device: torch.device) -> float:
    """The most that was held at a time since this was asked last, in GB."""
    if device.type != "cuda":
        return 0.0
    held = torch.cuda.max_memory_allocated(device) / GB
    torch.cuda.reset_peak_memory_stats(device)
    return held
