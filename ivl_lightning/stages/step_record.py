"""What an optimizer step is made of, before the weights move: its samples, their losses, the norms of its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ivl_lightning.config.schema import Part
from ivl_lightning.data.collate import documents_of
from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.data.ranks import gathered
from ivl_lightning.models.freeze import model_parts
from ivl_lightning.stages.base import Stage, stage_of
from ivl_lightning.structures import PackedBatch, PlannedPack, PreferenceBatch


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """A sample of a micro-batch.

    Attributes:
        sample: dataset, file and line.
        dataset: its name.
        tokens, tiles, labels: of the sample; of a pair of both its answers.
        loss: see `Stage.sample_losses`.
    """

    sample: str
    dataset: str
    tokens: int
    tiles: int
    labels: int
    loss: float


@dataclass(frozen=True, slots=True)
class MicroBatchRecord:
    """A micro-batch of one rank.

    Attributes:
        rank, micro_step: its place in the step.
        loss: its share of the step's loss; the shares of all micro-batches add up to it.
        samples: in the order of the pack.
    """

    rank: int
    micro_step: int
    loss: float
    samples: tuple[SampleRecord, ...]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A whole step, over all ranks.

    Attributes:
        epoch, step_of_epoch: its place in the plan.
        global_step: finished optimizer steps of the stage before it.
        norms: part that trains -> norm of its gradient, before clipping.
        micro_batches: by rank, then by micro-step.
    """

    epoch: int
    step_of_epoch: int
    global_step: int
    norms: dict[Part, float]
    micro_batches: tuple[MicroBatchRecord, ...]

    @property
    def loss(self) -> float:
        """Of the step."""
        return sum(micro.loss for micro in self.micro_batches)

    @property
    def bad_parts(self) -> list[str]:
        """Parts whose gradient is not finite."""
        return [part for part, norm in self.norms.items() if not is_finite(norm)]

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite, which JSON does not know, as text."""
        content = {**asdict(self), "loss": self.loss, "not_finite": self.bad_parts}
        plain = _plain(content)
        assert isinstance(plain, dict)
        return plain


@dataclass(frozen=True, slots=True)
class StepGradients:
    """What all ranks know alike of a step before its update.

    Attributes:
        norms: see `StepRecord`.
        losses_finite: of all micro-batches of all ranks.
    """

    norms: dict[Part, float]
    losses_finite: bool

    @property
    def norm(self) -> float:
        """Of the whole gradient."""
        return sum(norm**2 for norm in self.norms.values()) ** 0.5

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return self.losses_finite and is_finite(self.norm)


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    """A micro-batch of this rank while the step is added up; nothing here waits for the device."""

    planned: PlannedPack
    loss: Tensor
    sample_losses: Tensor
    sample_ids: tuple[str, ...]
    datasets: tuple[int, ...]
    tokens: tuple[int, ...]
    tiles: tuple[int, ...]
    labels: Tensor


class StepWatch(Callback):
    """Follows the micro-batches of each step; a subclass judges the step once its gradients are whole.

    Lightning calls `on_before_optimizer_step` behind the last micro-batch's backward pass and before clipping.
    """

    def __init__(self) -> None:
        self._batch: PackedBatch | PreferenceBatch | None = None
        self._micro_batches: list[_MicroBatch] = []

    def judge(self, trainer: L.Trainer, stage: Stage, step: StepGradients) -> None:
        """Called on all ranks with the same numbers; an error prevents the update."""
        raise NotImplementedError

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PackedBatch | PreferenceBatch, batch_idx: int
    ) -> None:
        """A step begins anew with its first micro-batch."""
        if batch.planned.micro_step == 0:
            self._micro_batches = []
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note the losses of a micro-batch."""
        batch, self._batch = self._batch, None
        losses = stage_of(pl_module).sample_losses
        assert batch is not None, "a backward pass without a batch"
        assert losses is not None, "training_step leaves the losses of its samples"
        self._micro_batches.append(
            _MicroBatch(
                batch.planned,
                # Lightning has divided by the accumulation; the ranks' gradients are averaged.
                loss.detach() / trainer.world_size,
                losses,
                batch.sample_ids,
                batch.sample_datasets,
                tuple(batch.cu_seqlens.diff().tolist()),
                batch.sample_tiles,
                _labels(batch),
            )
        )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Measure the gradients and judge the step."""
        stage = stage_of(pl_module)
        bad = torch.stack([~micro.loss.isfinite() for micro in self._micro_batches]).sum()
        self.judge(trainer, stage, step_gradients(stage, trainer, bad))

    def record(self, trainer: L.Trainer, step: StepGradients, *, global_step: int) -> StepRecord:
        """All that is known of the step that is being judged; every rank must call it.

        Args:
            trainer: of the run.
            step: its gradients.
            global_step: see `StepRecord`.
        """
        names = datamodule_of(trainer).mixture_names
        own = [_micro_batch_record(micro, trainer.global_rank, names) for micro in self._micro_batches]
        every = gathered(own, trainer.world_size)
        planned = self._micro_batches[0].planned
        return StepRecord(
            planned.epoch, planned.step, global_step, step.norms, tuple(micro for rank in every for micro in rank)
        )


def step_gradients(stage: Stage, trainer: L.Trainer, bad_losses: Tensor) -> StepGradients:
    """Norms of the parts' gradients, in one reduction over the ranks.

    A rank adds the square of what it holds, divided by the number of ranks that hold the same: under DDP all do, under
    HSDP those that a shard is replicated on.

    Args:
        stage: behind the backward pass of a step's last micro-batch.
        trainer: of the run.
        bad_losses: number of this rank's micro-batches whose loss is not finite, a scalar.
    """
    parts = _trained(stage)
    squares = [_square(_gradients(parameters), trainer.world_size).to(stage.device) for parameters in parts.values()]
    own = torch.stack([*squares, bad_losses.to(torch.float64)])
    *sums, bad = trainer.strategy.reduce(own, reduce_op="sum").tolist()
    return StepGradients({part: square**0.5 for part, square in zip(parts, sums, strict=True)}, bad == 0)


def gradient_checksums(stage: Stage, trainer: L.Trainer) -> dict[Part, int]:
    """Sum of the bits of each part's gradient, as integers: the same on any layout for the same gradients, bit by bit.

    Every rank must call it.

    Args:
        stage: behind the backward pass of a step's last micro-batch.
        trainer: of the run.
    """
    parts = _trained(stage)
    own = torch.zeros(len(parts), dtype=torch.int64, device=stage.device)
    for number, parameters in enumerate(parts.values()):
        for gradient in _gradients(parameters):
            local = _local(gradient)
            bits = local.view(torch.int32 if local.itemsize == 4 else torch.int16)
            own[number] += bits.sum(dtype=torch.int64).to(own.device)
    # Of one group: of copies, each rank has the whole sum.
    if not any(isinstance(value, DTensor) for values in parts.values() for value in values):
        return dict(zip(parts, own.tolist(), strict=True))
    copies = _copies(next(value for values in parts.values() for value in values), trainer.world_size)
    return dict(zip(parts, (trainer.strategy.reduce(own, reduce_op="sum") // copies).tolist(), strict=True))


def bad_step_file(folder: Path, global_step: int) -> Path:
    """Where the samples of a step are written that was not taken.

    Args:
        folder: of the stage.
        global_step: finished optimizer steps before it.
    """
    return folder / "bad_steps" / f"step={global_step:08d}.json"


def is_finite(number: float) -> bool:
    """Neither infinite nor no number at all."""
    return number - number == 0


def _trained(stage: Stage) -> dict[Part, list[nn.Parameter]]:
    """Parameters that train, by part, each once; without parts that are frozen."""
    found: dict[Part, list[nn.Parameter]] = {}
    for part, modules in model_parts(stage.internvl).items():
        # A head that is tied to the embedding is the same parameter.
        unique = {id(value): value for module in modules for value in module.parameters() if value.requires_grad}
        if unique:
            found[part] = list(unique.values())
    return found


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _square(gradients: list[Tensor], world_size: int) -> Tensor:
    """This rank's share of the squared norm, a float64 scalar."""
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(_copies(gradient, world_size), []).append(_local(gradient))
    shares = [get_total_norm(own).double() ** 2 / copies for copies, own in by_copies.items()]
    return torch.stack(shares).sum() if shares else torch.zeros((), dtype=torch.float64)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _copies(tensor: Tensor, world_size: int) -> int:
    """Ranks that hold the same numbers as this one."""
    if not isinstance(tensor, DTensor):
        return world_size
    copies = 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies *= tensor.device_mesh.size(dimension)
    return copies


def _labels(batch: PackedBatch | PreferenceBatch) -> Tensor:
    """Labels of each sample, `[D]`."""
    if isinstance(batch, PreferenceBatch):
        return batch.response_tokens.sum(dim=1)
    documents = documents_of(batch)
    return torch.zeros(len(batch.cu_seqlens) - 1, device=documents.device).index_add(
        0, documents, torch.ones_like(documents, dtype=torch.float32)
    )


def _micro_batch_record(micro: _MicroBatch, rank: int, names: tuple[str, ...]) -> MicroBatchRecord:
    # strict=False: an empty micro-batch has one document of filler, which is no sample.
    columns = zip(
        micro.sample_ids,
        (names[dataset] for dataset in micro.datasets),
        micro.tokens,
        micro.tiles,
        map(int, micro.labels.tolist()),
        micro.sample_losses.tolist(),
        strict=False,
    )
    samples = tuple(SampleRecord(*values) for values in columns)
    return MicroBatchRecord(rank, micro.planned.micro_step, float(micro.loss), samples)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not is_finite(value) else value
