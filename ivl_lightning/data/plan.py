"""The plan: what is read at each step and the step's exact loss normaliser, known before an image is opened.

A function of (index, mixture, seed, epoch, packs_per_step) alone, never of ranks, workers or accumulation: those only
decide how a step's packs are dealt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.config.schema import RepeatRule
from ivl_lightning.data.mixture import epoch_order, epoch_size
from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.reweighting import sample_weight
from ivl_lightning.structures import Pack, PlannedPack

EMPTY_PACK = Pack((), 0, 0)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """An optimizer step: its packs, dearest last, and the sum of their loss weights."""

    packs: tuple[Pack, ...]
    weight_sum: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """All steps of one epoch."""

    epoch: int
    steps: tuple[PlannedStep, ...]


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a plan depends on besides the rows.

    Attributes:
        packs_per_step: packs of an optimizer step over all ranks.
        max_tokens, max_tiles: caps of a pack.
        pool_size: samples the planner holds.
        seed: of order and groups.
        reduction: reweighting rule, which decides the normaliser.
        repeat_rule: see `epoch_order`.
        epochs: passes over the data in the run; None where only steps count.
    """

    packs_per_step: int
    max_tokens: int
    max_tiles: int
    pool_size: int
    seed: int
    reduction: str
    repeat_rule: RepeatRule = "random"
    epochs: int | None = None


class TrainingPlan:
    """Plans epochs over rows laid end to end.

    Args:
        tokens, labels, tiles: of every row, `[n]`.
        sizes: rows of each dataset.
        repeats: `repeat_time` of each dataset.
        settings: see `PlanSettings`.

    Raises:
        ValueError: there is no sample to train on, or packs_per_step is below 1.
    """

    def __init__(
        self,
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        tiles: NDArray[np.int64],
        *,
        sizes: Sequence[int],
        repeats: Sequence[float],
        settings: PlanSettings,
    ) -> None:
        if settings.packs_per_step < 1:
            raise ValueError(f"data.packs_per_step={settings.packs_per_step} must be at least 1")
        self.samples_per_epoch = epoch_size(sizes, repeats)
        if self.samples_per_epoch == 0:
            raise ValueError("there is no row to train on: every row was rejected, or every repeat_time is too small")
        self.tokens, self.labels, self.tiles = tokens, labels, tiles
        self.sizes, self.repeats, self.settings = tuple(sizes), tuple(repeats), settings

    def epoch(self, epoch: int) -> EpochPlan:
        """All steps of `epoch`.

        Raises:
            ValueError: a step without a single label, whose normaliser would be 0.
        """
        settings = self.settings
        order = epoch_order(self.sizes, self.repeats, seed=settings.seed, epoch=epoch, rule=settings.repeat_rule)
        rows = order % len(self.tokens)
        planner = PackPlanner(
            settings.max_tokens,
            settings.max_tiles,
            pool_size=settings.pool_size,
            world_size=settings.packs_per_step,
            seed=settings.seed + epoch,
        )
        packs = [
            Pack(tuple(int(order[sample]) for sample in pack.samples), pack.tokens, pack.tiles)
            for pack in planner.plan(self.tokens[rows].tolist(), self.tiles[rows].tolist())
        ]
        size = settings.packs_per_step
        steps = [self._step(epoch, packs[start : start + size]) for start in range(0, len(packs), size)]
        return EpochPlan(epoch, tuple(steps))

    def _step(self, epoch: int, packs: list[Pack]) -> PlannedStep:
        labels = [int(self.labels[sample % len(self.labels)]) for pack in packs for sample in pack.samples]
        weight_sum = float(sum(sample_weight(count, self.settings.reduction) for count in labels))
        if weight_sum == 0.0:
            raise ValueError(
                f"epoch {epoch}: a step of {len(labels)} samples has no label to train on. Rows without an answer "
                "teach nothing: remove them, or raise data.packs_per_step"
            )
        missing = self.settings.packs_per_step - len(packs)
        return PlannedStep((*packs, *[EMPTY_PACK] * missing), weight_sum, len(labels))

    def deal(self, plan: EpochPlan, rank: int, world_size: int, *, start_step: int = 0) -> Iterator[PlannedPack]:
        """The packs of one rank, in order: micro-step m of a step takes its pack m * R + rank.

        Args:
            plan: of an epoch.
            rank: of R data-parallel ranks.
            world_size: R; must divide packs_per_step (see `accumulation`).
            start_step: steps of the epoch already trained.
        """
        micro_steps = accumulation(self.settings.packs_per_step, world_size)
        consumed = np.cumsum([step.num_samples for step in plan.steps])
        total = self.samples_per_epoch * (self.settings.epochs or 1)
        before = plan.epoch * self.samples_per_epoch
        for number in range(start_step, len(plan.steps)):
            step = plan.steps[number]
            progress = min(1.0, (before + int(consumed[number])) / total)
            for micro in range(micro_steps):
                pack = step.packs[micro * world_size + rank]
                yield PlannedPack(
                    pack,
                    plan.epoch,
                    number,
                    micro,
                    micro_steps,
                    self.settings.packs_per_step,
                    step.weight_sum,
                    progress,
                )


def accumulation(packs_per_step: int, world_size: int) -> int:
    """Micro-steps of a step on each of R ranks.

    Raises:
        ValueError: R does not divide packs_per_step; names both.
    """
    if packs_per_step % world_size:
        raise ValueError(
            f"data.packs_per_step={packs_per_step} cannot be dealt to {world_size} data-parallel ranks evenly: "
            "make it a multiple"
        )
    return packs_per_step // world_size


def fixed_plan(
    tokens: Sequence[int],
    labels: Sequence[int],
    tiles: Sequence[int],
    *,
    max_tokens: int,
    max_tiles: int,
    reduction: str,
    rank: int,
    world_size: int,
) -> list[PlannedPack]:
    """Validation packs of one rank: rows in file order, no repeats; the packs are the same on any layout.

    Every rank gets the same number, empty packs at the end, so that forwards match.
    """
    packs = list(PackPlanner(max_tokens, max_tiles).plan(tokens, tiles))
    weight_sum = float(sum(sample_weight(int(count), reduction) for count in labels))
    packs += [EMPTY_PACK] * (-len(packs) % world_size)
    return [
        PlannedPack(pack, 0, number, 0, 1, world_size, weight_sum, 0.0)
        for number, pack in enumerate(packs)
        if number % world_size == rank
    ]
