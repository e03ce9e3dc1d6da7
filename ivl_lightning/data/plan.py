"""The plan: what is read at each step and the step's exact loss normaliser, known before an image is opened.

A function of (index, mixture, seed, epoch, packs_per_step) alone, never of ranks, workers or accumulation: those only
decide how a step's packs are dealt. It is made while the epoch runs, a window of packs ahead; the state that comes
with each step continues it there at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.config.schema import RepeatRule
from ivl_lightning.data.hashing import splitmix64
from ivl_lightning.data.mixture import Share, epoch_order, epoch_size
from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.reweighting import sample_weight
from ivl_lightning.structures import Pack, PlannedPack

EMPTY_PACK = Pack((), 0, 0)
NO_ROW = "there is no row to train on: every row was rejected, or every repeat_time is too small"
Cost = tuple[float, float, float]
"""Modeled work per token, per squared document length, per tile."""
DEFAULT_COST: Cost = (1.0e9, 4.3e4, 0.73e12)
"""Of InternVL 2.5 1B; see `models.cost`."""


@dataclass(frozen=True, slots=True)
class PlanRows:
    """What the plan knows of the rows of all datasets laid end to end, `[N]` each.

    Attributes:
        tokens, labels, tiles: of each row; of a video with the most frames it may get.
        most_frames, fewest_frames: of each video; 0 for other rows.
        frame_tokens: tokens that the first n frames take beyond those of the first one; empty without videos.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    tiles: NDArray[np.int32]
    most_frames: NDArray[np.int16]
    fewest_frames: NDArray[np.int16]
    frame_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def planned_tokens(self, row: int, frames: int) -> int:
        """Tokens of a row, of a video with so many frames (0: the most it may get)."""
        tokens = int(self.tokens[row])
        return tokens - int(self.frame_tokens[self.most_frames[row]] - self.frame_tokens[frames]) if frames else tokens


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """An optimizer step.

    Attributes:
        epoch, number: its place; steps count within the epoch.
        packs: `packs_per_step`, by rising cost; some of the epoch's last step may be empty.
        costs: modeled work of each pack.
        weight_sum: sum of the samples' loss weights.
        consumed: samples of the epoch up to and with this step.
        state: continues the plan behind this step; plain numbers and lists.
    """

    epoch: int
    number: int
    packs: tuple[Pack, ...]
    costs: tuple[float, ...]
    weight_sum: float
    consumed: int
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a plan depends on besides the rows.

    Attributes:
        packs_per_step: packs of an optimizer step over all ranks.
        max_tokens, max_tiles: caps of a pack.
        pool_size: samples the planner holds.
        seed: of order, frames and groups.
        reduction: reweighting rule, which decides the normaliser.
        repeat_rule: see `epoch_order`.
        cost: modeled work, by which packs are grouped.
        max_frames: most frames a video may be given; what is drawn.
        batch_samples: conversations of an optimizer step; None where as many as fill the packs.
        batch_pairs: preference pairs of an optimizer step; None for conversations.
        augmentation_seed: of the frames of preference pairs.
        epochs: passes over the data in the run; None where only steps count.
    """

    packs_per_step: int
    max_tokens: int
    max_tiles: int
    pool_size: int
    seed: int
    reduction: str
    repeat_rule: RepeatRule = "random"
    cost: Cost = DEFAULT_COST
    max_frames: int = 32
    batch_samples: int | None = None
    batch_pairs: int | None = None
    augmentation_seed: int = 0
    epochs: int | None = None


class TrainingPlan:
    """Plans epochs; a step holds what fills its packs.

    Args:
        rows: of the mixture's datasets.
        mixture: samples of each dataset in an epoch.
        settings: see `PlanSettings`.

    Raises:
        ValueError: there is no sample to train on, or packs_per_step is below 1.
    """

    size_setting: ClassVar[str] = "data.packs_per_step"
    """What decides how many samples a step holds."""

    def __init__(self, rows: PlanRows, mixture: Sequence[Share], settings: PlanSettings) -> None:
        if settings.packs_per_step < 1:
            raise ValueError(f"data.packs_per_step={settings.packs_per_step} must be at least 1")
        self.samples_per_epoch = epoch_size(mixture)
        if self.samples_per_epoch == 0:
            raise ValueError(NO_ROW)
        self.rows, self.mixture, self.settings = rows, tuple(mixture), settings

    def prepare(self, epoch: int) -> None:
        """Make what must be known before the first step of an epoch; here nothing, since the plan streams.

        Raises:
            ValueError: the epoch cannot be planned.
        """

    def check(self, first: int, max_steps: int | None) -> None:
        """Refuse a run that would be refused later; here nothing, since the plan streams.

        Args:
            first: epoch with which the run begins.
            max_steps: of the trainer; None where only `settings.epochs` ends the run.

        Raises:
            ValueError: an epoch of the run cannot be planned.
        """

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of every epoch; None where only planning an epoch tells."""
        return None

    def epoch(self, epoch: int, state: dict[str, Any] | None = None) -> Iterator[PlannedStep]:
        """The steps of `epoch`, or those behind the step that `state` came with.

        Raises:
            ValueError: a step without a single label, whose normaliser would be 0.
        """
        settings = self.settings
        order = epoch_order(self.mixture, seed=settings.seed, epoch=epoch, rule=settings.repeat_rule)
        frames, tokens, tiles = self._sizes(order, epoch)
        planner = self._planner(epoch)
        step, consumed = 0, 0
        if state is not None:
            step, consumed = state["step"], state["consumed"]
            planner.load_state_dict(state["planner"])
        packs = planner.plan(tokens, tiles)
        while group := list(islice(packs, settings.packs_per_step)):
            consumed += sum(len(pack.samples) for pack in group)
            costs = [planner.pack_cost(pack.samples, tokens, tiles) for pack in group]
            named = [with_numbers(pack, order, frames) for pack in group]
            missing = settings.packs_per_step - len(group)
            yield PlannedStep(
                epoch,
                step,
                (*named, *[EMPTY_PACK] * missing),
                (*costs, *[0.0] * missing),
                self._weight_sum(np.concatenate([pack.samples for pack in named]), epoch, step),
                consumed,
                {"step": step + 1, "consumed": consumed, "planner": planner.state_dict()},
            )
            step += 1

    def _planner(self, epoch: int) -> PackPlanner:
        settings = self.settings
        return PackPlanner(
            settings.max_tokens,
            settings.max_tiles,
            pool_size=settings.pool_size,
            world_size=settings.packs_per_step,
            seed=settings.seed + epoch,
            cost=settings.cost,
        )

    def _sizes(
        self, order: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int16] | None, NDArray[np.int32], NDArray[np.int32]]:
        """Frames (None without videos), tokens and tiles of each sample of the epoch, in its order."""
        rows = order % len(self.rows)
        tokens, tiles = self.rows.tokens[rows], self.rows.tiles[rows]
        most = self.rows.most_frames[rows]
        if not most.any():
            return None, tokens, tiles
        fewest = self.rows.fewest_frames[rows]
        settings = self.settings
        frames = draw_frames(order, fewest, most, settings.max_frames, seed=settings.seed, epoch=epoch)
        return frames, *self._shortened(tokens, tiles, most, frames)

    def _shortened(
        self,
        tokens: NDArray[np.int32],
        tiles: NDArray[np.int32],
        most: NDArray[np.int16],
        frames: NDArray[np.int16],
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens and tiles of samples whose videos get `frames` and not the `most` they may get."""
        spare = self.rows.frame_tokens[most] - self.rows.frame_tokens[frames]
        return tokens - spare.astype(tokens.dtype), tiles - (most - frames)

    def _weight_sum(self, samples: NDArray[np.int64], epoch: int, step: int) -> float:
        labels = self._labels_of(samples, epoch, step)
        return float(sum(sample_weight(int(count), self.settings.reduction) for count in labels))

    def _labels_of(self, samples: NDArray[np.int64], epoch: int, step: int) -> NDArray[np.int32]:
        """Labels that decide the weight of each of a step's samples.

        Raises:
            ValueError: there is none.
        """
        labels = self._labels[samples % len(self.rows)]
        if not labels.any():
            raise ValueError(
                f"epoch {epoch}, step {step}: its {len(labels)} samples have no label to train on. Rows without an "
                f"answer teach nothing: remove them, or raise {self.size_setting}"
            )
        return labels

    @property
    def _labels(self) -> NDArray[np.int32]:
        """Labels of each row that decide the weight of its samples, `[N]`."""
        return self.rows.labels

    def deal(self, steps: Iterable[PlannedStep], rank: int, world_size: int) -> Iterator[PlannedPack]:
        """The packs of one rank, in order: micro-step m of a step takes its pack m * R + rank.

        Args:
            steps: of an epoch.
            rank: of R data-parallel ranks.
            world_size: R; must divide packs_per_step (see `accumulation`).
        """
        micro_steps = accumulation(self.settings.packs_per_step, world_size)
        total = self.samples_per_epoch * (self.settings.epochs or 1)
        for step in steps:
            progress = min(1.0, (step.epoch * self.samples_per_epoch + step.consumed) / total)
            idle = idle_share(step.costs, world_size)
            samples = sum(len(pack.samples) for pack in step.packs)
            for micro in range(micro_steps):
                yield PlannedPack(
                    step.packs[micro * world_size + rank],
                    step.epoch,
                    step.number,
                    micro,
                    micro_steps,
                    self.settings.packs_per_step,
                    step.weight_sum,
                    progress,
                    idle,
                    samples,
                )

    def fewest_steps(self) -> float:
        """Steps of an epoch that no plan can fall below: the fuller of the two caps, filled to the last place."""
        tokens = tiles = 0.0
        start = 0
        for share in self.mixture:
            rows = slice(start, start + share.rows)
            start += share.rows
            if not share.rows:
                continue
            most, fewest = self.rows.most_frames[rows], self.rows.fewest_frames[rows]
            spare = spare_frames(most, fewest, self.settings.max_frames)
            length = self.rows.tokens[rows].sum(dtype=np.float64) - spare.sum() * self._tokens_per_frame
            tokens += length / share.rows * share.samples
            tiles += (self.rows.tiles[rows].sum(dtype=np.float64) - spare.sum()) / share.rows * share.samples
        packs = max(tokens / self.settings.max_tokens, tiles / max(self.settings.max_tiles, 1))
        return packs / self.settings.packs_per_step

    @property
    def _tokens_per_frame(self) -> float:
        table = self.rows.frame_tokens
        return float(table[-1]) / max(len(table) - 2, 1) if len(table) else 0.0


def draw_frames(
    samples: NDArray[np.integer[Any]],
    fewest: NDArray[np.int16],
    most: NDArray[np.int16],
    highest: int,
    *,
    seed: int,
    epoch: int,
) -> NDArray[np.int16]:
    """A number of frames for each sample, from (seed, epoch, sample) alone.

    Drawn uniformly from [fewest, highest] and capped by what the video has, as in the original; where the number is
    fixed, fewest equals most. The sample's number is hashed (SplitMix64), so that it does not matter which samples
    there are besides.

    Args:
        samples: sample numbers, `[n]`.
        fewest, most: frames of each, `[n]`; 0 for samples without a video.
        highest: `max_frames`.
        seed, epoch: the only source of randomness.
    """
    bits = splitmix64(splitmix64(np.asarray(samples).astype(np.uint64), seed), epoch)
    choices = np.where(fewest < most, highest - fewest + 1, 1).astype(np.uint64)
    return np.minimum(fewest + (bits % choices).astype(np.int16), most).astype(np.int16)


def spare_frames(most: NDArray[np.integer[Any]], fewest: NDArray[np.integer[Any]], highest: int) -> NDArray[np.float64]:
    """Frames that a draw leaves out on average: the mean of max(0, most - drawn), drawn from fewest to highest.

    A video of at most 10 and at least 8 frames, with draws of 8 to 32: 8 leaves out 2, 9 leaves out 1, and the other
    23 none, so 3 / 25.

    Args:
        most, fewest: frames of each row, `[n]`; 0 without a video.
        highest: `max_frames`.
    """
    spare = most.astype(float) - fewest
    return spare * (spare + 1) / 2 / np.maximum(highest + 1.0 - fewest, 1)


def with_numbers(pack: Pack, order: NDArray[np.int64], frames: NDArray[np.int16] | None) -> Pack:
    """The pack with sample numbers in place of places in the order, and each sample's frames."""
    places = list(pack.samples)
    drawn = () if frames is None else tuple(frames[places].tolist())
    return replace(pack, samples=tuple(order[places].tolist()), frames=drawn if any(drawn) else ())


def idle_share(costs: Sequence[float], world_size: int) -> float:
    """Share of R ranks' time that is spent waiting for the slowest, where R packs at a time run side by side.

    With costs 2 and 4 on two ranks: both take 4, so 2 of 8 are idle, 0.25.
    """
    rounds = np.asarray(costs).reshape(-1, world_size)
    busy = world_size * rounds.max(axis=1).sum()
    return float(1 - rounds.sum() / busy) if busy else 0.0


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
    rows: PlanRows, *, max_tokens: int, max_tiles: int, reduction: str, rank: int, world_size: int
) -> list[PlannedPack]:
    """Validation packs of one rank: rows in file order, no repeats; the packs are the same on any layout.

    Every rank gets the same number, empty packs at the end, so that forwards match.
    """
    packs = list(PackPlanner(max_tokens, max_tiles).plan(rows.tokens, rows.tiles))
    weight_sum = float(sum(sample_weight(int(count), reduction) for count in rows.labels))
    return dealt_once(packs, weight_sum=weight_sum, rank=rank, world_size=world_size)


def dealt_once(packs: list[Pack], *, weight_sum: float, rank: int, world_size: int) -> list[PlannedPack]:
    """One rank's share of packs that no optimizer step is made of; see `fixed_plan`."""
    whole = [*packs, *[EMPTY_PACK] * (-len(packs) % world_size)]
    return [
        PlannedPack(pack, 0, number, 0, 1, world_size, weight_sum, 0.0)
        for number, pack in enumerate(whole)
        if number % world_size == rank
    ]
