"""PackPlanner: which samples share a pack, decided on metadata alone.

Samples pass by in arrival order. The planner holds a bounded pool of them; a pack starts with the oldest and takes, in
order of arrival, every sample of the pool that still fits under both caps (first fit). So the oldest sample is always
in the next pack and nothing starves. Packs are gathered in a window, sorted by cost and dealt as groups of like cost,
so that ranks working side by side finish together; the groups' order is shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ivl_lightning.structures import Pack

WINDOW_GROUPS = 8
"""Groups gathered before they are sorted and dealt."""


class PackPlanner:
    """Streams packs under two hard caps.

    Args:
        max_tokens: tokens of a pack at most.
        max_tiles: tiles of a pack at most.
        pool_size: samples held at a time.
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
        self._pool: list[int] = []
        self._ready: list[tuple[int, ...]] = []
        self._rng = np.random.default_rng(seed)

    def plan(self, tokens: Sequence[int], tiles: Sequence[int]) -> Iterator[Pack]:
        """Packs of samples 0 .. n-1 in arrival order; after `load_state_dict`, the packs not yet given.

        Args:
            tokens: tokens of each sample, `[n]`.
            tiles: tiles of each sample, `[n]`.

        Raises:
            ValueError: a sample alone is over a cap; names it.
        """
        while True:
            while self._ready:
                samples = self._ready.pop(0)
                yield self._as_pack(samples, tokens, tiles)
            if self._exhausted(tokens):
                return
            self._deal(self._gather_window(tokens, tiles), tokens, tiles)

    def state_dict(self) -> dict[str, Any]:
        """Position, pool, packs planned but not given, and the generator: plain numbers and lists."""
        return {
            "next": self._next,
            "pool": list(self._pool),
            "ready": [list(samples) for samples in self._ready],
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._next = state["next"]
        self._pool = list(state["pool"])
        self._ready = [tuple(samples) for samples in state["ready"]]
        self._rng.bit_generator.state = state["rng"]

    def _exhausted(self, tokens: Sequence[int]) -> bool:
        return not self._pool and self._next >= len(tokens)

    def _gather_window(self, tokens: Sequence[int], tiles: Sequence[int]) -> list[tuple[int, ...]]:
        # Groups of one are of like cost by themselves: packs then pass in the order in which they were filled.
        size = 1 if self.world_size == 1 else WINDOW_GROUPS * self.world_size
        window: list[tuple[int, ...]] = []
        while len(window) < size:
            self._fill_pool(tokens, tiles)
            if not self._pool:
                break
            window.append(self._take_pack(tokens, tiles))
        return window

    def _fill_pool(self, tokens: Sequence[int], tiles: Sequence[int]) -> None:
        while len(self._pool) < self.pool_size and self._next < len(tokens):
            sample = self._next
            if tokens[sample] > self.max_tokens or tiles[sample] > self.max_tiles:
                raise ValueError(
                    f"sample {sample} has {tokens[sample]} tokens and {tiles[sample]} tiles, a pack holds "
                    f"{self.max_tokens} and {self.max_tiles}"
                )
            self._pool.append(sample)
            self._next += 1

    def _take_pack(self, tokens: Sequence[int], tiles: Sequence[int]) -> tuple[int, ...]:
        token_room, tile_room = self.max_tokens, self.max_tiles
        taken: list[int] = []
        left: list[int] = []
        for sample in self._pool:
            if tokens[sample] <= token_room and tiles[sample] <= tile_room:
                token_room -= int(tokens[sample])
                tile_room -= int(tiles[sample])
                taken.append(sample)
            else:
                left.append(sample)
        self._pool = left
        return tuple(taken)

    def _deal(self, packs: list[tuple[int, ...]], tokens: Sequence[int], tiles: Sequence[int]) -> None:
        """Sort by cost, cut into groups, shuffle the groups; a short last group stays last."""
        packs = sorted(packs, key=lambda samples: self.pack_cost(samples, tokens, tiles))
        groups = [packs[start : start + self.world_size] for start in range(0, len(packs), self.world_size)]
        full = [group for group in groups if len(group) == self.world_size]
        short = [group for group in groups if len(group) < self.world_size]
        for index in self._rng.permutation(len(full)):
            self._ready.extend(full[index])
        for group in short:
            self._ready.extend(group)

    def pack_cost(self, samples: Sequence[int], tokens: Sequence[int], tiles: Sequence[int]) -> float:
        """Modeled cost of a pack: tokens, squared document lengths and tiles, each by its weight."""
        per_token, per_square, per_tile = self.cost
        lengths = [int(tokens[sample]) for sample in samples]
        squares = sum(length * length for length in lengths)
        return per_token * sum(lengths) + per_square * squares + per_tile * sum(int(tiles[s]) for s in samples)

    def _as_pack(self, samples: tuple[int, ...], tokens: Sequence[int], tiles: Sequence[int]) -> Pack:
        return Pack(samples, sum(int(tokens[s]) for s in samples), sum(int(tiles[s]) for s in samples))
