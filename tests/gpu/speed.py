"""What a training step on one GPU takes: model FLOPs utilization, memory, tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import InternVLConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.attention import KERNELS
from ivl_lightning.models.build import enable_activation_checkpointing
from ivl_lightning.models.cost import head_cost, projector_cost, training_cost
from ivl_lightning.models.last_layer import select_in_last_layer
from ivl_lightning.models.shard import compile_blocks, shard_model
from ivl_lightning.optim.adamw import AdamW
from ivl_lightning.stages.root import InternVLWithLoss
from ivl_lightning.structures import PackedBatch
from tests.gpu.scale import Scale, network, packed

ALL = ("vision", "projector", "llm")


@dataclass(frozen=True, slots=True)
class Case:
    """A way to train.

    Attributes:
        kernel: of the language model's attention.
        checkpointing: recompute blocks in backward.
        precision: `fsdp` keeps float32 weights and computes in bfloat16 (`strategy=fsdp
            strategy.param_dtype=bfloat16`), `autocast` is `trainer.precision=bf16-mixed`, `bfloat16` is
            `model.dtype=bfloat16`.
        compiled: each block is compiled (`strategy.compile_blocks=true`).
    """

    kernel: str
    checkpointing: bool = True
    precision: str = "fsdp"
    compiled: bool = False

    @property
    def name(self) -> str:
        extras = [self.precision, *(["checkpointing"] if self.checkpointing else [])]
        return ", ".join([self.kernel, *extras, *(["compiled"] if self.compiled else [])])


def cases(kernels: list[str], *, compiled: bool) -> list[Case]:
    """Most telling ones first; a run that is cut short has those."""
    best = kernels[0]
    return [
        *(Case(kernel, checkpointing) for checkpointing in (True, False) for kernel in kernels),
        *(Case(best, checkpointing, compiled=True) for checkpointing in (True, False) if compiled),
        Case(best, True, "autocast"),
        Case(best, True, "bfloat16"),
        Case(best, False, "bfloat16"),
    ]


def flops(config: InternVLConfig, batch: PackedBatch) -> float:
    """Floating-point operations that a step needs: forward and backward of everything, nothing recomputed.

    The last block's feed-forward half is counted for all tokens, as is usual, though it runs on supervised ones alone.
    """
    token, square, tile = training_cost(config, ALL)
    lengths, tiles = batch.cu_seqlens.diff().double(), len(batch.pixel_values)
    vision = tiles * (tile + 3 * projector_cost(config))
    return float(
        lengths.sum() * token + (lengths**2).sum() * square + vision + 3 * head_cost(config) * len(batch.loss_rows)
    )


class Training:
    """A network, its optimizer and a pack, ready to take steps.

    Args:
        scale: sizes.
        case: how.
        device: where.
    """

    def __init__(self, scale: Scale, case: Case, device: torch.device) -> None:
        self.device, self.case = device, case
        config = scale.config()
        host = packed(config, scale.tiles, scale.text)
        self.flops, self.tokens = flops(config, host), host.input_ids.numel()
        self.host = host.pin_memory() if device.type == "cuda" else host
        model = network(config, KERNELS[case.kernel], device)
        if case.precision == "bfloat16":
            model = model.bfloat16()
        select_in_last_layer(model)
        if case.checkpointing:
            enable_activation_checkpointing(model)
        if case.compiled:
            compile_blocks(model)
        self.root = InternVLWithLoss(model, NextTokenLoss(), always_run_vision=True)
        if case.precision == "fsdp":
            mesh = init_device_mesh(device.type, (1,))
            shard_model(self.root, model, mesh, param_dtype=torch.bfloat16, reshard_after_forward=False)
            assert isinstance(self.root, FSDPModule)
        groups = [{"params": list(self.root.parameters()), "lr": 1e-5, "weight_decay": 0.01}]
        self.optimizer = AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        self.weight = float(host.loss_weights.sum())

    def step(self) -> Tensor:
        """Transfer, forward, backward, clipping and AdamW; the loss, on the device."""
        batch = self.host.to(self.device)
        mixed = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        with mixed if self.case.precision == "autocast" else nullcontext():
            loss = self.root(batch)[0] / self.weight
        loss.backward()
        nn.utils.clip_grad_norm_(self.root.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def measure(scale: Scale, case: Case, device: torch.device, peak: float | None) -> dict[str, Any]:
    """Figures of a case.

    Args:
        scale: sizes.
        case: how.
        device: where.
        peak: FLOP/s of the device in bfloat16; None where it is not known.
    """
    training = Training(scale, case, device)
    losses = [training.step() for _ in range(scale.warm_up)]
    with watched(device) as reading:
        losses += [training.step() for _ in range(scale.steps)]
    seconds = reading["seconds"] / scale.steps
    return {
        "seconds per step": seconds,
        "tokens per second": training.tokens / seconds,
        "MFU": None if peak is None else training.flops / seconds / peak,
        "model TFLOP per step": training.flops / 1e12,
        "peak GB": reading["peak GB"],
        "losses": [float(loss) for loss in losses],
    }


def profile(scale: Scale, case: Case, device: torch.device) -> dict[str, Any]:
    """Where a step's time goes: operators by their own time on the device, and the share of it that is idle."""
    training = Training(scale, case, device)
    for _ in range(scale.warm_up):
        training.step()
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with watched(device) as reading, torch.profiler.profile(activities=kinds) as found:
        training.step()
        synchronize(device)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, own))
    kernels = [event for event in events if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(getattr(event, own) for event in kernels) / 1e6
    top = {event.key[:80]: round(getattr(event, own) / 1e3, 2) for event in kernels[:25]}
    return {"milliseconds": top, "busy seconds": busy, "seconds with the profiler": reading["seconds"]}


def measure_head(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Output head and loss alone: supervised rows in chunks, beside transformers' full logits."""

    def ours(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        rows = torch.arange(scale.supervised, device=device)
        weights = torch.full((scale.supervised,), 1 / scale.supervised, device=device)
        return NextTokenLoss("token")(hidden.index_select(0, rows), head, labels[rows + 1], weights)[0]

    def full(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return ForCausalLMLoss(nn.functional.linear(hidden[None], head), labels[None], scale.vocabulary)

    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"supervised rows": ours, "full logits": full}
    return {name: _head(scale, device, loss) for name, loss in ways.items()}


def _head(scale: Scale, device: torch.device, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden = torch.randn(scale.rows, scale.hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    head = (torch.randn(scale.vocabulary, scale.hidden, device=device) * 0.02).bfloat16().requires_grad_()
    labels = torch.full((scale.rows,), IGNORE_INDEX)
    labels[1 : scale.supervised + 1] = torch.randint(0, scale.vocabulary, (scale.supervised,))
    labels = labels.to(device)
    base = torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    for _ in range(scale.warm_up):
        loss(hidden, head, labels).backward()
        hidden.grad = head.grad = None
    with watched(device) as reading:
        found = loss(hidden, head, labels)
        found.backward()
    peak = None if reading["peak GB"] is None else reading["peak GB"] - base
    return {"milliseconds": reading["seconds"] * 1e3, "peak GB above the inputs": peak, "loss": float(found.detach())}


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds of what runs inside, and the most memory that tensors took, in GB; None on a CPU."""
    reading: dict[str, Any] = {"peak GB": None}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    start = time.perf_counter()
    yield reading
    synchronize(device)
    reading["seconds"] = time.perf_counter() - start
    if device.type == "cuda":
        reading["peak GB"] = torch.cuda.max_memory_allocated() / 1e9


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def join_group(device: torch.device) -> str:
    """A process group of this process alone, without any network; its backend."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_backend()
