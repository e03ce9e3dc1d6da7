"""PackPlanner: which samples share a pack, decided on metadata alone.

Samples pass by in arrival order and the planner holds a bounded pool of them.

- *Select.* The oldest sample is always in the next pack, so nothing starves.
- *Target.* A pack should hold the mean sample as often as it takes to hit a cap: the scarcer one of tokens and tiles
  full, the other resource and the modeled cost as the stream has them. So packs resemble one another, and what stays in
  the pool resembles what came. The pool's own mean has a say, which stops it drifting.
- *Search.* Of many completions that fit under both caps, the one nearest to the target (see `pack_search`).
- *Pack.* Consecutive packs are gathered in a window, sorted by cost and dealt as groups of like cost, so that ranks
  working side by side finish together; the order of the groups is shuffled.
- *Maintain.* What was taken leaves the pool, the rest keeps its order. All there is to save are sample numbers, four
  sums and the shuffle's generator: some kilobytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.pack_search import CompletionSearch, Goal
from ivl_lightning.structures import Pack

WINDOW_PACKS, WINDOW_SAMPLES = 96, 900
"""Packs and samples gathered before they are sorted, in whole groups and at least one. More packs make groups more
alike; more samples move farther from their place of arrival, and make the state larger."""
SEARCH_WIDTH = 64
"""Oldest samples of the pool that a search looks at; those behind them only inform the target."""
POOL_SHARE = 0.5
"""Weight of the pool's mean in the target; the stream's mean has the rest."""
MEMORY = 16_384
"""Samples after which the stream's sums are halved, so that the mean follows a stream that changes."""
UNUSED_WEIGHT, OTHER_WEIGHT, COST_WEIGHT = 2.0, 0.1, 0.2
"""What counts against a completion: scarce room left unused, as a share of the cap; the other resource off its target,
as a share of its cap; cost off its target, as a share of the target. Fill comes first, likeness second: one tile of 48
unused weighs as much as a cost 20 % off."""
CHUNK = 4096
"""Samples read from the arrays at a time."""
TINY = 1e-9
"""Divides where a model has no cost at all."""

NUMBER, TOKENS, TILES = 0, 1, 2
"""Rows of a block of samples, int64 `[3, n]`."""

IntArray = NDArray[np.int64]
Numbers = Sequence[int] | NDArray[np.integer[Any]]


class PackPlanner:
    """Streams packs under two hard caps.

    Args:
        max_tokens: tokens of a pack at most.
        max_tiles: tiles of a pack at most.
        pool_size: samples held at a time, besides those of packs already decided.
        world_size: packs of a group, that is of like cost side by side.
        seed: of the groups' order.
        cost: cost per token, per squared document length, per tile.

    Raises:
        ValueError: a cap, pool or group size below 1 (tiles may be 0).
    """

    def __init__(
        self,
        max_tokens: int,
        max_tiles: int,
        pool_size: int = 64,
        world_size: int = 1,
        seed: int = 0,
        cost: tuple[float, float, float] = (1.0e9, 4.3e4, 0.73e12),
    ) -> None:
        if max_tokens < 1 or max_tiles < 0 or pool_size < 1 or world_size < 1:
            raise ValueError(
                f"PackPlanner needs positive sizes, got max_tokens={max_tokens}, max_tiles={max_tiles}, "
                f"pool_size={pool_size}, world_size={world_size}"
            )
        self.max_tokens = max_tokens
        self.max_tiles = max_tiles
        self.pool_size = pool_size
        self.world_size = world_size
        self.cost = cost
        self._next = 0
        self._pool = np.zeros((3, 0), dtype=np.int64)
        self._ready: deque[tuple[int, ...]] = deque()
        self._seen = _totals(self._pool)
        self._rng = np.random.default_rng(seed)
        self._search = CompletionSearch(min(pool_size, SEARCH_WIDTH))

    def plan(self, tokens: Numbers, tiles: Numbers) -> Iterator[Pack]:
        """Packs of samples 0 .. n-1 in arrival order; after `load_state_dict`, the packs not yet given.

        Args:
            tokens: tokens of each sample, `[n]`.
            tiles: tiles of each sample, `[n]`.

        Raises:
            ValueError: a sample alone is over a cap; names it.
        """
        source = _Source(tokens, tiles, self.max_tokens, self.max_tiles)
        self._pool = source.look_up(self._pool[NUMBER])
        while True:
            while self._ready:
                yield _as_pack(self._ready.popleft(), tokens, tiles)
            window = self._gather_window(source)
            if not window:
                return
            self._deal(window, tokens, tiles)

    def state_dict(self) -> dict[str, Any]:
        """Position, pool, packs planned but not given, sums of the stream, generator: plain numbers and lists."""
        return {
            "next": self._next,
            "pool": self._pool[NUMBER].tolist(),
            "ready": [list(samples) for samples in self._ready],
            "seen": self._seen.tolist(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._next = state["next"]
        # Only the numbers are saved: `plan`, which has the arrays, looks up the rest.
        self._pool = np.zeros((3, len(state["pool"])), dtype=np.int64)
        self._pool[NUMBER] = state["pool"]
        self._ready = deque(tuple(samples) for samples in state["ready"])
        self._seen = np.array(state["seen"], dtype=np.int64)
        self._rng.bit_generator.state = state["rng"]

    def pack_cost(self, samples: Sequence[int], tokens: Numbers, tiles: Numbers) -> float:
        """Modeled cost of a pack: tokens, squared document lengths and tiles, each by its weight."""
        per_token, per_square, per_tile = self.cost
        lengths = [int(tokens[sample]) for sample in samples]
        squares = sum(length * length for length in lengths)
        return per_token * sum(lengths) + per_square * squares + per_tile * sum(int(tiles[s]) for s in samples)

    def _gather_window(self, source: _Source) -> list[tuple[int, ...]]:
        # A pack alone has nobody to resemble: packs pass in the order in which they were filled.
        most = 1 if self.world_size == 1 else WINDOW_PACKS
        window: list[tuple[int, ...]] = []
        num_samples = 0
        while samples := self._take_pack(source):
            window.append(samples)
            num_samples += len(samples)
            whole_groups = len(window) % self.world_size == 0
            if whole_groups and (len(window) + self.world_size > most or num_samples >= WINDOW_SAMPLES):
                break
        return window

    def _deal(self, packs: list[tuple[int, ...]], tokens: Numbers, tiles: Numbers) -> None:
        """Sort by cost, cut into groups, shuffle the groups; a short last group stays last."""
        packs = sorted(packs, key=lambda samples: self.pack_cost(samples, tokens, tiles))
        groups = [packs[start : start + self.world_size] for start in range(0, len(packs), self.world_size)]
        num_full = len(packs) // self.world_size
        for index in self._rng.permutation(num_full):
            self._ready.extend(groups[index])
        for group in groups[num_full:]:
            self._ready.extend(group)

    def _take_pack(self, source: _Source) -> tuple[int, ...]:
        """The next pack, out of the pool; empty at the end of the stream."""
        decided = self._take_oldest(source)
        samples: list[int] = decided[NUMBER].tolist()
        if self._pool.shape[1]:
            chosen = np.zeros(self._pool.shape[1], dtype=np.bool_)
            chosen[self._complete(decided)] = True
            samples += self._pool[NUMBER, chosen].tolist()
            self._pool = self._pool[:, ~chosen]
        return tuple(samples)

    def _take_oldest(self, source: _Source) -> IntArray:
        """The oldest sample, and more while those behind it could not fill the room twice over.

        A search needs a choice. Where samples are so small that all it looks at fit into a pack or two, most of the
        pack is taken in order of arrival and only the rest of it searched. So are the last samples of the stream.
        """
        self._fill_pool(source)
        decided, self._pool = self._pool[:, :1], self._pool[:, 1:]
        while count := self._num_without_choice(decided):
            decided, self._pool = np.concatenate((decided, self._pool[:, :count]), axis=1), self._pool[:, count:]
            self._fill_pool(source)
        return decided

    def _num_without_choice(self, decided: IntArray) -> int:
        """How many of the oldest fit beside those decided and leave a room that the search could not fill twice."""
        window = self._pool[TOKENS:, :SEARCH_WIDTH]
        room = np.array([self.max_tokens, self.max_tiles]) - decided[TOKENS:].sum(axis=1)
        room_left = room[:, None] - window.cumsum(axis=1)
        too_few = 2 * (room_left + window) >= window.sum(axis=1, keepdims=True)
        return int(((room_left >= 0) & too_few).all(axis=0).sum())

    def _fill_pool(self, source: _Source) -> None:
        while (room := self.pool_size - self._pool.shape[1]) and self._next < len(source):
            arrived = source.read(self._next, room)
            self._next += arrived.shape[1]
            self._pool = np.concatenate((self._pool, arrived), axis=1)
            self._seen = self._seen + _totals(arrived)
            if self._seen[0] > MEMORY:
                self._seen = self._seen // 2

    def _complete(self, decided: IntArray) -> list[int]:
        """Places in the pool of the samples that complete a pack best."""
        target = self._target()
        scarce, other = target.scarce, 1 - target.scarce
        caps = (self.max_tokens, self.max_tiles)
        used = decided[TOKENS:].sum(axis=1).tolist()
        window = self._pool[TOKENS:, :SEARCH_WIDTH]
        goal = Goal(
            scarce_room=caps[scarce] - used[scarce],
            other_room=caps[other] - used[other],
            other_spare=caps[other] - target.amounts[other],
            cost=target.cost - float(self._costs(decided[TOKENS:]).sum()),
            scarce_price=UNUSED_WEIGHT / max(caps[scarce], 1),
            other_price=OTHER_WEIGHT / max(caps[other], 1),
            cost_price=COST_WEIGHT / max(target.cost, TINY),
        )
        return self._search.best(np.stack((window[scarce], window[other], self._costs(window))), goal)

    def _target(self) -> _Target:
        """The mean sample, as often as it takes to hit a cap."""
        held = _totals(self._pool)
        means = POOL_SHARE * held[1:] / held[0] + (1 - POOL_SHARE) * self._seen[1:] / self._seen[0]
        tokens, squares, tiles = means.tolist()
        # Where a target is asked for something in the pool does not fit, so one of the means is above 0.
        counts = [
            cap / mean if mean > 0 else np.inf for cap, mean in ((self.max_tokens, tokens), (self.max_tiles, tiles))
        ]
        count = min(counts)
        per_token, per_square, per_tile = self.cost
        return _Target(
            scarce=counts.index(count),
            amounts=(count * tokens, count * tiles),
            cost=count * (per_token * tokens + per_square * squares + per_tile * tiles),
        )

    def _costs(self, needs: IntArray) -> NDArray[np.float64]:
        """Modeled cost of each sample by itself, of tokens and tiles `[2, n]`; a pack's cost is their sum."""
        tokens, tiles = needs.astype(np.float64)
        per_token, per_square, per_tile = self.cost
        return per_token * tokens + per_square * tokens * tokens + per_tile * tiles


@dataclass(frozen=True, slots=True)
class _Target:
    """What a pack should hold.

    Attributes:
        scarce: 0 where tokens run out first, 1 where tiles do.
        amounts: tokens and tiles; the scarce one is at its cap.
        cost: modeled.
    """

    scarce: int
    amounts: tuple[float, float]
    cost: float


class _Source:
    """The caller's arrays, which may be long: read in chunks, and checked against the caps on the way."""

    def __init__(self, tokens: Numbers, tiles: Numbers, max_tokens: int, max_tiles: int) -> None:
        self._tokens, self._tiles = tokens, tiles
        self._max_tokens, self._max_tiles = max_tokens, max_tiles
        self._start = 0
        self._chunk = np.zeros((3, 0), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, most: int) -> IntArray:
        """Samples from `start` on: at least one, at most `most`.

        Raises:
            ValueError: a sample of the chunk is over a cap.
        """
        offset = start - self._start
        if not 0 <= offset < self._chunk.shape[1]:
            self._start, offset = start, 0
            self._chunk = self._read_chunk(start, min(start + CHUNK, len(self)))
        return self._chunk[:, offset : offset + most]

    def look_up(self, numbers: IntArray) -> IntArray:
        """Samples of these numbers."""
        columns = [(number, self._tokens[number], self._tiles[number]) for number in numbers.tolist()]
        return np.array(columns, dtype=np.int64).reshape(-1, 3).T

    def _read_chunk(self, start: int, stop: int) -> IntArray:
        rows = (np.arange(start, stop), self._tokens[start:stop], self._tiles[start:stop])
        chunk = np.stack([np.asarray(row, dtype=np.int64) for row in rows])
        over = (chunk[TOKENS] > self._max_tokens) | (chunk[TILES] > self._max_tiles)
        if over.any():
            sample, tokens, tiles = chunk[:, over.argmax()].tolist()
            raise ValueError(
                f"sample {sample} has {tokens} tokens and {tiles} tiles, a pack holds "
                f"{self._max_tokens} and {self._max_tiles}"
            )
        return chunk


def _totals(block: IntArray) -> IntArray:
    """Samples, tokens, squared tokens and tiles: whole numbers, whose sums do not depend on the order."""
    tokens, tiles = block[TOKENS], block[TILES]
    return np.array([len(tokens), tokens.sum(), tokens @ tokens, tiles.sum()], dtype=np.int64)


def _as_pack(samples: tuple[int, ...], tokens: Numbers, tiles: Numbers) -> Pack:
    return Pack(samples, sum(int(tokens[s]) for s in samples), sum(int(tiles[s]) for s in samples))
