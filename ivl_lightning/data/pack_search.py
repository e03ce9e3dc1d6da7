"""What fills the room that is left in a pack: many near-perfect completions, and the best of them.

A completion is a prefix and at most two samples more. Prefixes come from first fit in order of arrival, at every
length, and again while a part of the room is kept back: then small samples go in first and leave a gap that two larger
ones may fill exactly. The pairs lie sorted by what they need, so each prefix looks only at those next to the gap it
leaves: some hundreds of completions are scored instead of a hundred thousand.

Whatever decides is a whole number or a sum in a fixed order, so that all machines decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESERVES = (0.0, 0.4, 0.8)
"""Share of the room that each first fit keeps back for pairs, ascending (see `_grow_prefixes`)."""
NEIGHBORS = 16
"""Pairs looked at for each prefix."""

NOBODY = 0
"""Number of a sample that needs nothing: paired with another it stands for one sample, with itself for none."""

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a completion should come to.

    Scarce is the one of the two resources, tokens or tiles, that the stream as a whole runs out of first.

    Attributes:
        scarce_room, other_room: what is left of each in the pack: the hard limits.
        other_spare: what should be left of the other one when the scarce one is used up.
        cost: what the completion should cost.
        scarce_price: of a unit of scarce room left unused.
        other_price, cost_price: of a unit of the other resource and of cost off the goal.
    """

    scarce_room: int
    other_room: int
    other_spare: float
    cost: float
    scarce_price: float
    other_price: float
    cost_price: float


@dataclass(frozen=True, slots=True)
class _Prefixes:
    """Beginnings of completions, one a row; among equals the earlier row wins.

    Attributes:
        chains: `NOBODY` and then the samples that a first fit took, in that order.
        chain, length: a row is the first `length` of a chain, `[rows]`.
        gaps: what is left of scarce room, other room and cost, `[3, rows]`.
        members: which samples a row holds, `[rows, samples]`; `NOBODY` may always join.
    """

    chains: list[list[int]]
    chain: IntArray
    length: IntArray
    gaps: FloatArray
    members: NDArray[np.bool_]


class CompletionSearch:
    """Finds the best completion.

    Args:
        width: samples it is given at most.
    """

    def __init__(self, width: int) -> None:
        # Ordered by the larger number, so that the pairs among any first samples are the first of the table.
        larger, smaller = np.tril_indices(width + 1, -1)
        self._larger = np.concatenate(([NOBODY], larger))
        self._smaller = np.concatenate(([NOBODY], smaller))

    def best(self, needs: FloatArray, goal: Goal) -> list[int]:
        """Places of the samples that complete the pack best; none where none fits.

        Args:
            needs: of the scarce resource, of the other one, and cost of samples in order of arrival, `[3, n]`; the
                resources in whole numbers.
            goal: what to reach.
        """
        needs = np.concatenate((np.zeros((3, 1)), needs), axis=1)
        prefixes = _grow_prefixes(needs, goal)
        larger, smaller = self._nearest_pairs(needs, prefixes.gaps, goal)
        scarce_left, other_left, cost_left = (
            prefixes.gaps[:, :, None] - needs.take(larger, axis=1) - needs.take(smaller, axis=1)
        )
        score = (
            goal.scarce_price * scarce_left
            + goal.other_price * np.abs(other_left - goal.other_spare)
            + goal.cost_price * np.abs(cost_left)
        )
        twice = _in_prefix(prefixes, larger) | _in_prefix(prefixes, smaller)
        score[(scarce_left < 0) | (other_left < 0) | twice] = np.inf
        row, column = divmod(int(score.argmin()), score.shape[1])
        if score[row, column] == np.inf:
            samples = prefixes.chains[0]
        else:
            begun = prefixes.chains[prefixes.chain[row]][: prefixes.length[row]]
            samples = [*begun, int(larger[row, column]), int(smaller[row, column])]
        return sorted(sample - 1 for sample in samples if sample != NOBODY)

    def _nearest_pairs(self, needs: FloatArray, gaps: FloatArray, goal: Goal) -> tuple[IntArray, IntArray]:
        """For each prefix the pairs that need about what it leaves: larger and smaller number, `[rows, neighbors]`."""
        num_samples = needs.shape[1]
        num_pairs = 1 + num_samples * (num_samples - 1) // 2
        larger, smaller = self._larger[:num_pairs], self._smaller[:num_pairs]
        # One number orders the pairs by the scarce resource, then by the other, and names the pair. So no two are
        # equal, whatever way a machine sorts; and numbers sort faster than places do.
        scarce, other = needs[:2].astype(np.int64)
        most_scarce, most_other = 2 * int(scarce.max()), 2 * int(other.max())
        needed = scarce * (most_other + 1) + other
        keys = (needed.take(larger) + needed.take(smaller)) * num_pairs + np.arange(num_pairs)
        keys.sort()
        wanted_scarce = np.minimum(gaps[0], most_scarce)
        wanted_other = _between(0, gaps[1] - goal.other_spare, most_other)
        wanted = (wanted_scarce * (most_other + 1) + wanted_other).astype(np.int64) * num_pairs
        neighbors = min(NEIGHBORS, num_pairs)
        start = _between(0, np.searchsorted(keys, wanted) - neighbors // 2, num_pairs - neighbors)
        pairs = keys.take(start[:, None] + np.arange(neighbors)) % num_pairs
        return larger.take(pairs), smaller.take(pairs)


def _grow_prefixes(needs: FloatArray, goal: Goal) -> _Prefixes:
    scarce, other = needs[0].tolist(), needs[1].tolist()
    chains = [_first_fit(scarce, other, goal.scarce_room * (1 - reserve), goal.other_room) for reserve in RESERVES]
    # Chains part for good where the one with less room refuses a sample, so the one before shares the most with it.
    known = [0, *(_num_shared(before, after) for before, after in pairwise(chains))]
    lengths = [np.arange(len(chain), shared, -1) for chain, shared in zip(chains, known, strict=True)]
    used, members = [], []
    for chain, length in zip(chains, lengths, strict=True):
        used.append(needs[:, chain].cumsum(axis=1)[:, length - 1])
        place = np.full(len(scarce), len(scarce))
        place[chain[1:]] = np.arange(1, len(chain))
        members.append(place < length[:, None])
    return _Prefixes(
        chains,
        chain=np.repeat(np.arange(len(chains)), [len(length) for length in lengths]),
        length=np.concatenate(lengths),
        gaps=np.array([[goal.scarce_room], [goal.other_room], [goal.cost]]) - np.concatenate(used, axis=1),
        members=np.concatenate(members),
    )


def _first_fit(scarce: list[float], other: list[float], scarce_room: float, other_room: float) -> list[int]:
    """In order of arrival every sample that fits beside those taken before it; `NOBODY` always does."""
    chain = []
    for sample, (scarce_need, other_need) in enumerate(zip(scarce, other, strict=True)):
        if scarce_need <= scarce_room and other_need <= other_room:
            scarce_room -= scarce_need
            other_room -= other_need
            chain.append(sample)
    return chain


def _num_shared(first: list[int], second: list[int]) -> int:
    # strict=False: chains may differ in length, and the shorter may be the beginning of the longer.
    for number, (one, two) in enumerate(zip(first, second, strict=False)):
        if one != two:
            return number
    return min(len(first), len(second))


def _in_prefix(prefixes: _Prefixes, samples: IntArray) -> NDArray[np.bool_]:
    """Whether each row's prefix holds the samples already, `[rows, ...]`."""
    num_rows, num_samples = prefixes.members.shape
    # As one long row: `take` is several times faster than indexing by two arrays.
    return prefixes.members.take(samples + num_samples * np.arange(num_rows)[:, None])


def _between(low: int, values: NDArray[Any], high: int) -> NDArray[Any]:
    """`np.clip`, which looks up the limits of the data type at each call and takes longer than the rest around it."""
    return np.maximum(low, np.minimum(values, high))
