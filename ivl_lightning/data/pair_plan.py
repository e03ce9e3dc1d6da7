"""The plan of preference training: steps of a fixed number of pairs, each step's pairs spread over its packs.

The number of packs of a step is fixed too, so that accumulation is. An epoch is planned whole before its first step:
whether every step's pairs fit into its packs is known then.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.mixture import Share, epoch_order
from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.data.plan import (
    EMPTY_PACK,
    PlannedStep,
    PlanRows,
    PlanSettings,
    TrainingPlan,
    draw_frames,
    with_numbers,
)
from ivl_lightning.reweighting import sample_weight
from ivl_lightning.structures import Pack


@dataclass(frozen=True, slots=True)
class PairRows(PlanRows):
    """What the plan knows of the pairs of all datasets laid end to end, `[N]` each.

    Attributes:
        chosen_labels: supervised tokens of each chosen answer.
        digests: hash of each row's bytes.
    """

    chosen_labels: NDArray[np.int32]
    digests: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Epoch:
    """An epoch's pairs in order.

    Attributes:
        number: of the epoch.
        order: sample numbers.
        frames: of each, None without videos.
        tokens, tiles, costs: of each.
        packs: of its step, the pack each goes to.
    """

    number: int
    order: NDArray[np.int64]
    frames: NDArray[np.int16] | None
    tokens: NDArray[np.int32]
    tiles: NDArray[np.int32]
    costs: NDArray[np.float64]
    packs: NDArray[np.int32]


class PairPlan(TrainingPlan):
    """Plans epochs of preference pairs; see `TrainingPlan`.

    A step holds `batch_pairs` pairs, and an epoch's last one what is left. The frames of a video are drawn from
    (augmentation_seed, row), the same in every epoch.

    Args:
        rows: of the mixture's datasets.
        mixture: samples of each dataset in an epoch.
        settings: with `batch_pairs`.

    Raises:
        ValueError: there is no pair to train on, or batch_pairs is below 1.
    """

    rows: PairRows

    def __init__(self, rows: PairRows, mixture: Sequence[Share], settings: PlanSettings) -> None:
        super().__init__(rows, mixture, settings)
        assert settings.batch_pairs is not None
        if settings.batch_pairs < 1:
            raise ValueError(f"data.batch_pairs={settings.batch_pairs} must be at least 1")
        self._batch = settings.batch_pairs
        self._planned: _Epoch | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch."""
        return -(-self.samples_per_epoch // self._batch)

    def fewest_steps(self) -> float:
        """As many as there are."""
        return float(self.steps_per_epoch)

    def prepare(self, epoch: int) -> None:
        """Plan an epoch whole.

        Raises:
            ValueError: the pairs of a step do not fit into `packs_per_step` packs; names both numbers.
        """
        if self._planned is not None and self._planned.number == epoch:
            return
        settings = self.settings
        order = epoch_order(self.mixture, seed=settings.seed, epoch=epoch, rule=settings.repeat_rule)
        frames, tokens, tiles = self._sizes(order, epoch)
        per_token, per_square, per_tile = settings.cost
        lengths = tokens.astype(np.float64)
        costs = per_token * lengths + per_square * lengths * lengths + per_tile * tiles
        packs = np.empty(len(order), np.int32)
        for step, start in enumerate(range(0, len(order), self._batch)):
            pairs = slice(start, start + self._batch)
            packs[pairs] = self._spread(costs[pairs], tokens[pairs], tiles[pairs], f"epoch {epoch}, step {step}")
        self._planned = _Epoch(epoch, order, frames, tokens, tiles, costs, packs)

    def epoch(self, epoch: int, state: dict[str, Any] | None = None) -> Iterator[PlannedStep]:
        """The steps of `epoch`, or those behind the step that `state` came with.

        Raises:
            ValueError: as `prepare`.
        """
        self.prepare(epoch)
        assert self._planned is not None
        first = 0 if state is None else state["step"]
        return (self._step(self._planned, number) for number in range(first, self.steps_per_epoch))

    def packs_needed(self, epoch: int) -> int:
        """The fewest `packs_per_step` that first fit finds enough for every step of an epoch."""
        settings = self.settings
        order = epoch_order(self.mixture, seed=settings.seed, epoch=epoch, rule=settings.repeat_rule)
        _, tokens, tiles = self._sizes(order, epoch)
        sizes = [(0.0, int(length), int(count)) for length, count in zip(tokens, tiles, strict=True)]
        caps = settings.max_tokens, settings.max_tiles
        starts = range(0, len(sizes), self._batch)
        return max(max(_to_first(sizes[start : start + self._batch], caps)) + 1 for start in starts)

    def used_rows(self, max_steps: int | None) -> NDArray[np.int64]:
        """Rows that a run trains on, rising; all where it has no end.

        Args:
            max_steps: of the trainer; None where only `settings.epochs` ends the run.
        """
        steps = self._steps(max_steps)
        if steps is None:
            return np.arange(len(self.rows))
        used = np.zeros(len(self.rows), dtype=bool)
        for epoch in range(-(-steps // self.steps_per_epoch)):
            order = epoch_order(self.mixture, seed=self.settings.seed, epoch=epoch, rule=self.settings.repeat_rule)
            used[order[: (steps - epoch * self.steps_per_epoch) * self._batch] % len(self.rows)] = True
        return np.flatnonzero(used)

    def check(self, first: int, max_steps: int | None) -> None:
        """Plan every epoch of a run from `first` on, as far as its end is known, and `first` last.

        Raises:
            ValueError: as `prepare`.
        """
        steps = self._steps(max_steps) or 0
        for epoch in range(-(-steps // self.steps_per_epoch) - 1, first, -1):
            self.prepare(epoch)
        self.prepare(first)

    def _steps(self, max_steps: int | None) -> int | None:
        """Steps of a run; None where it has no end."""
        epochs = self.settings.epochs
        limits = (max_steps, None if epochs is None else epochs * self.steps_per_epoch)
        return min((limit for limit in limits if limit is not None), default=None)

    def packs_of(self, rows: NDArray[np.int64]) -> list[Pack]:
        """Some rows in packs, each row once, with the frames it is trained with."""
        frames, tokens, tiles = self._sizes(rows, 0)
        planner = PackPlanner(self.settings.max_tokens, self.settings.max_tiles)
        return [with_numbers(pack, rows, frames) for pack in planner.plan(tokens, tiles)]

    def _sizes(
        self, order: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int16] | None, NDArray[np.int32], NDArray[np.int32]]:
        rows = order % len(self.rows)
        tokens, tiles, most = self.rows.tokens[rows], self.rows.tiles[rows], self.rows.most_frames[rows]
        if not most.any():
            return None, tokens, tiles
        fewest, seed = self.rows.fewest_frames[rows], self.settings.augmentation_seed
        frames = draw_frames(self.rows.digests[rows], fewest, most, self.settings.max_frames, seed=seed, epoch=0)
        return frames, *self._shortened(tokens, tiles, most, frames)

    def _spread(
        self, costs: NDArray[np.float64], tokens: NDArray[np.int32], tiles: NDArray[np.int32], where: str
    ) -> list[int]:
        """The pack of each pair of a step: by falling cost to the cheapest pack; where that fails, the fullest first.

        Raises:
            ValueError: they do not fit.
        """
        settings = self.settings
        sizes = list(zip(costs.tolist(), tokens.tolist(), tiles.tolist(), strict=True))
        caps = settings.max_tokens, settings.max_tiles
        by_cost = sorted(range(len(sizes)), key=lambda pair: (-sizes[pair][0], pair))
        packs = _to_cheapest(by_cost, sizes, caps, settings.packs_per_step)
        if packs is None:
            packs = _to_first(sizes, caps)
            needed = max(packs) + 1
            if needed > settings.packs_per_step:
                raise ValueError(
                    f"{where}: its {len(sizes)} pairs fill {needed} packs of {caps[0]} tokens and {caps[1]} tiles, but "
                    f"data.packs_per_step={settings.packs_per_step}: raise it (a multiple of the ranks), or "
                    f"data.max_tokens and data.max_pack_tiles, or lower data.batch_pairs={self._batch}"
                )
        return packs

    def _step(self, planned: _Epoch, number: int) -> PlannedStep:
        start = number * self._batch
        stop = min(start + self._batch, len(planned.order))
        members: list[list[int]] = [[] for _ in range(self.settings.packs_per_step)]
        for place, pack in enumerate(planned.packs[start:stop].tolist(), start):
            members[pack].append(place)
        weighed = sorted((float(planned.costs[places].sum()), places) for places in members if places)
        packs = [self._pack(planned, places) for _, places in weighed]
        missing = self.settings.packs_per_step - len(packs)
        labels = self.rows.chosen_labels[planned.order[start:stop] % len(self.rows)]
        return PlannedStep(
            planned.number,
            number,
            (*[EMPTY_PACK] * missing, *packs),
            (*[0.0] * missing, *(cost for cost, _ in weighed)),
            float(sum(sample_weight(int(count), self.settings.reduction) for count in labels)),
            stop,
            {"step": number + 1, "consumed": stop},
        )

    def _pack(self, planned: _Epoch, places: list[int]) -> Pack:
        pack = Pack(tuple(places), int(planned.tokens[places].sum()), int(planned.tiles[places].sum()))
        return with_numbers(pack, planned.order, planned.frames)


def _to_cheapest(
    order: Sequence[int], sizes: Sequence[tuple[float, int, int]], caps: tuple[int, int], packs: int
) -> list[int] | None:
    """Each pair to the pack with the least work so far that has room for it; None where one finds no room.

    Longest-processing-time rule: ranks that run the packs side by side finish together.
    """
    heap = [(0.0, pack, *caps) for pack in range(packs)]
    chosen = [0] * len(sizes)
    for pair in order:
        cost, tokens, tiles = sizes[pair]
        full = []
        while heap and (heap[0][2] < tokens or heap[0][3] < tiles):
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        work, pack, token_room, tile_room = heap[0]
        heapq.heapreplace(heap, (work + cost, pack, token_room - tokens, tile_room - tiles))
        chosen[pair] = pack
        for entry in full:
            heapq.heappush(heap, entry)
    return chosen


def _to_first(sizes: Sequence[tuple[float, int, int]], caps: tuple[int, int]) -> list[int]:
    """First fit by falling share of the scarcer cap: few packs, whatever their work."""
    room: list[tuple[int, int]] = []
    chosen = [0] * len(sizes)
    for pair in sorted(range(len(sizes)), key=lambda pair: (-_share(sizes[pair], caps), pair)):
        _, tokens, tiles = sizes[pair]
        fitting = (number for number, (spare, slots) in enumerate(room) if spare >= tokens and slots >= tiles)
        pack = next(fitting, len(room))
        if pack == len(room):
            room.append(caps)
        room[pack] = room[pack][0] - tokens, room[pack][1] - tiles
        chosen[pair] = pack
    return chosen


def _share(size: tuple[float, int, int], caps: tuple[int, int]) -> float:
    return max(size[1] / caps[0], size[2] / max(caps[1], 1))
