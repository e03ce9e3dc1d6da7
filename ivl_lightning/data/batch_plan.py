"""The plan of steps of a fixed number of samples, each step's samples spread over its packs.

The number of packs of a step is fixed too, so that accumulation is. An epoch is planned whole before its first step:
whether every step's samples fit into its packs is known then. It is held with 22 bytes a sample, 4 of them the pack.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.mixture import Share, epoch_order
from ivl_lightning.data.plan import EMPTY_PACK, PlannedStep, PlanRows, PlanSettings, TrainingPlan, with_numbers
from ivl_lightning.structures import Pack

Size = tuple[float, int, int]
"""Modeled work, tokens and tiles of a sample."""


@dataclass(frozen=True, slots=True)
class _Samples:
    """An epoch's samples in order, or those of a step, `[n]` each.

    Attributes:
        order: sample numbers.
        frames: of each, None without videos.
        tokens, tiles: of each.
        packs: of its step, the pack each goes to.
    """

    order: NDArray[np.int64]
    frames: NDArray[np.int16] | None
    tokens: NDArray[np.int32]
    tiles: NDArray[np.int32]
    packs: NDArray[np.int32]

    def part(self, start: int, stop: int) -> _Samples:
        """Samples from `start` to `stop`; views, so that their packs are set in the whole."""
        part = slice(start, stop)
        frames = None if self.frames is None else self.frames[part]
        return _Samples(self.order[part], frames, self.tokens[part], self.tiles[part], self.packs[part])


class BatchPlan(TrainingPlan):
    """Plans epochs whose steps hold a number of samples and not as many as fill the packs; see `TrainingPlan`.

    A step holds `batch_samples` samples, and an epoch's last one what is left.

    Args:
        rows: of the mixture's datasets.
        mixture: samples of each dataset in an epoch.
        settings: with `batch_samples`.

    Raises:
        ValueError: there is no sample to train on, or batch_samples is below 1.
    """

    size_setting: ClassVar[str] = "data.batch_samples"
    unit: ClassVar[str] = "samples"

    def __init__(self, rows: PlanRows, mixture: Sequence[Share], settings: PlanSettings) -> None:
        super().__init__(rows, mixture, settings)
        if self.batch < 1:
            raise ValueError(f"{self.size_setting}={self.batch} must be at least 1")
        self._epoch: int | None = None
        self._planned: _Samples | None = None

    @property
    def batch(self) -> int:
        """Samples of a step."""
        assert self.settings.batch_samples is not None
        return self.settings.batch_samples

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch."""
        return -(-self.samples_per_epoch // self.batch)

    def fewest_steps(self) -> float:
        """As many as there are."""
        return float(self.steps_per_epoch)

    def prepare(self, epoch: int) -> None:
        """Plan an epoch whole.

        Raises:
            ValueError: the samples of a step do not fit into `packs_per_step` packs, with both numbers; or none of
                them has a label.
        """
        if epoch == self._epoch:
            return
        # Given back first, so that no two epochs are held at a time.
        self._epoch = self._planned = None
        planned = self._samples(epoch)
        for step in range(self.steps_per_epoch):
            part = self._part(planned, step)
            part.packs[:] = self._spread(part, epoch, step)
            self._labels_of(part.order, epoch, step)
        self._epoch, self._planned = epoch, planned

    def check(self, first: int, max_steps: int | None) -> None:
        """Plan every epoch of a run from `first` on, as far as its end is known, and `first` last.

        Raises:
            ValueError: as `prepare`.
        """
        steps = self.steps_of_run(max_steps) or 0
        for epoch in range(-(-steps // self.steps_per_epoch) - 1, first, -1):
            self.prepare(epoch)
        self.prepare(first)

    def epoch(self, epoch: int, state: dict[str, Any] | None = None) -> Iterator[PlannedStep]:
        """The steps of `epoch`, or those behind the step that `state` came with.

        Raises:
            ValueError: as `prepare`.
        """
        self.prepare(epoch)
        assert self._planned is not None
        planned, first = self._planned, 0 if state is None else state["step"]
        return (self._step(planned, epoch, number) for number in range(first, self.steps_per_epoch))

    def packs_needed(self, epoch: int) -> int:
        """The fewest `packs_per_step` that first fit finds enough for every step of an epoch."""
        samples = self._samples(epoch)
        steps = (self._part(samples, step) for step in range(self.steps_per_epoch))
        return max(max(_to_first(self._sizes_of(step), self._caps)) + 1 for step in steps)

    def steps_of_run(self, max_steps: int | None) -> int | None:
        """Steps of a run; None where it has no end.

        Args:
            max_steps: of the trainer; None where only `settings.epochs` ends the run.
        """
        epochs = self.settings.epochs
        limits = (max_steps, None if epochs is None else epochs * self.steps_per_epoch)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def _caps(self) -> tuple[int, int]:
        return self.settings.max_tokens, self.settings.max_tiles

    def _samples(self, epoch: int) -> _Samples:
        """The samples of an epoch, whose packs are still to be chosen."""
        order = epoch_order(self.mixture, seed=self.settings.seed, epoch=epoch, rule=self.settings.repeat_rule)
        return _Samples(order, *self._sizes(order, epoch), np.zeros(len(order), np.int32))

    def _part(self, samples: _Samples, step: int) -> _Samples:
        return samples.part(step * self.batch, (step + 1) * self.batch)

    def _spread(self, samples: _Samples, epoch: int, step: int) -> list[int]:
        """The pack of each sample of a step: by falling cost to the cheapest pack; where that fails, the fullest first.

        Raises:
            ValueError: they do not fit.
        """
        most = self.settings.packs_per_step
        sizes = self._sizes_of(samples)
        packs = _to_cheapest(sizes, self._caps, most)
        if packs is None:
            packs = _to_first(sizes, self._caps)
            needed = max(packs) + 1
            if needed > most:
                tokens, tiles = self._caps
                raise ValueError(
                    f"epoch {epoch}, step {step}: its {len(sizes)} {self.unit} fill {needed} packs of {tokens} tokens "
                    f"and {tiles} tiles, but data.packs_per_step={most}: raise it (a multiple of the ranks; "
                    f"{self.packs_needed(epoch)} are enough for every step of this epoch), or data.max_tokens and "
                    f"data.max_pack_tiles, or lower {self.size_setting}={self.batch}"
                )
        return packs

    def _sizes_of(self, samples: _Samples) -> list[Size]:
        costs = self._costs(samples).tolist()
        return list(zip(costs, samples.tokens.tolist(), samples.tiles.tolist(), strict=True))

    def _costs(self, samples: _Samples) -> NDArray[np.float64]:
        """Modeled work of each sample; a pack's is their sum."""
        per_token, per_square, per_tile = self.settings.cost
        lengths = samples.tokens.astype(np.float64)
        return per_token * lengths + per_square * lengths * lengths + per_tile * samples.tiles

    def _step(self, planned: _Samples, epoch: int, number: int) -> PlannedStep:
        samples = self._part(planned, number)
        costs = self._costs(samples)
        members: list[list[int]] = [[] for _ in range(self.settings.packs_per_step)]
        for place, pack in enumerate(samples.packs.tolist()):
            members[pack].append(place)
        weighed = sorted((float(costs[places].sum()), places) for places in members if places)
        missing = self.settings.packs_per_step - len(weighed)
        consumed = number * self.batch + len(costs)
        return PlannedStep(
            epoch,
            number,
            (*[EMPTY_PACK] * missing, *(_pack(samples, places) for _, places in weighed)),
            (*[0.0] * missing, *(cost for cost, _ in weighed)),
            self._weight_sum(samples.order, epoch, number),
            consumed,
            {"step": number + 1, "consumed": consumed},
        )


def _pack(samples: _Samples, places: list[int]) -> Pack:
    pack = Pack(tuple(places), int(samples.tokens[places].sum()), int(samples.tiles[places].sum()))
    return with_numbers(pack, samples.order, samples.frames)


def _to_cheapest(sizes: Sequence[Size], caps: tuple[int, int], packs: int) -> list[int] | None:
    """Each sample to the pack with the least work so far that has room for it; None where one finds no room.

    Longest-processing-time rule: ranks that run the packs side by side finish together.
    """
    heap = [(0.0, pack, *caps) for pack in range(packs)]
    chosen = [0] * len(sizes)
    for sample in sorted(range(len(sizes)), key=lambda sample: (-sizes[sample][0], sample)):
        cost, tokens, tiles = sizes[sample]
        full = []
        while heap and (heap[0][2] < tokens or heap[0][3] < tiles):
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        work, pack, token_room, tile_room = heap[0]
        heapq.heapreplace(heap, (work + cost, pack, token_room - tokens, tile_room - tiles))
        chosen[sample] = pack
        for entry in full:
            heapq.heappush(heap, entry)
    return chosen


def _to_first(sizes: Sequence[Size], caps: tuple[int, int]) -> list[int]:
    """First fit by falling share of the scarcer cap: few packs, whatever their work."""
    room: list[tuple[int, int]] = []
    chosen = [0] * len(sizes)
    for sample in sorted(range(len(sizes)), key=lambda sample: (-_share(sizes[sample], caps), sample)):
        _, tokens, tiles = sizes[sample]
        fitting = (number for number, (spare, slots) in enumerate(room) if spare >= tokens and slots >= tiles)
        pack = next(fitting, len(room))
        if pack == len(room):
            room.append(caps)
        room[pack] = room[pack][0] - tokens, room[pack][1] - tiles
        chosen[sample] = pack
    return chosen


def _share(size: Size, caps: tuple[int, int]) -> float:
    return max(size[1] / caps[0], size[2] / max(caps[1], 1))
