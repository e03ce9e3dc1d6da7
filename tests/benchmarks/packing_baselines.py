"""Packers to compare with, each written anew from a description of its rule; sample numbers in, sample numbers out.

Each takes tokens and tiles in arrival order and returns packs in the order in which they would be trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Packs = list[list[int]]


@dataclass(slots=True)
class _Buffer:
    tokens: int = 0
    tiles: int = 0
    samples: list[int] = field(default_factory=list)

    def fits(self, tokens: int, tiles: int, max_tokens: int, max_tiles: int) -> bool:
        return self.tokens + tokens <= max_tokens and self.tiles + tiles <= max_tiles

    def add(self, sample: int, tokens: int, tiles: int) -> None:
        self.samples.append(sample)
        self.tokens += tokens
        self.tiles += tiles


def next_fit(tokens: IntArray, tiles: IntArray, max_tokens: int, max_tiles: int) -> Packs:
    """One open pack; a sample that does not fit closes it."""
    packs: Packs = []
    buffer = _Buffer()
    for sample, need in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True)):
        if not buffer.fits(*need, max_tokens, max_tiles):
            packs.append(buffer.samples)
            buffer = _Buffer()
        buffer.add(sample, *need)
    return [*packs, buffer.samples] if buffer.samples else packs


def buffered_first_fit(
    tokens: IntArray, tiles: IntArray, max_tokens: int, max_tiles: int, *, num_buffers: int = 20
) -> Packs:
    """OpenGVLab's rule: open packs sorted by tiles, a sample joins the one with the most tiles that takes it.

    A pack leaves when its tokens or its tiles are full, and the one with the most tiles when there are too many. In
    the original a text carries one tile, a blank one: give such samples a tile to have that.
    """
    packs: Packs = []
    buffers: list[_Buffer] = []
    for sample, need in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True)):
        found = next((number for number, b in enumerate(buffers) if b.fits(*need, max_tokens, max_tiles)), None)
        buffer = _Buffer() if found is None else buffers.pop(found)
        buffer.add(sample, *need)
        if buffer.tokens == max_tokens:
            packs.append(buffer.samples)
            continue
        place = next((number for number, b in enumerate(buffers) if b.tiles < buffer.tiles), len(buffers))
        buffers.insert(place, buffer)
        while buffers and (buffers[0].tiles == max_tiles or len(buffers) > num_buffers):
            packs.append(buffers.pop(0).samples)
    return packs + [buffer.samples for buffer in buffers]


def token_greedy(tokens: IntArray, tiles: IntArray, max_tokens: int, max_tiles: int, *, buffer_size: int = 64) -> Packs:
    """VeOmni's rule: first fit by tokens over the oldest samples held; tiles are not looked at."""
    del tiles, max_tiles
    packs: Packs = []
    held: list[int] = []
    needs = tokens.tolist()
    position = 0
    while held or position < len(needs):
        arrived = min(buffer_size - len(held), len(needs) - position)
        held.extend(range(position, position + arrived))
        position += arrived
        room = max_tokens
        pack: list[int] = []
        left: list[int] = []
        for sample in held:
            if needs[sample] <= room:
                room -= needs[sample]
                pack.append(sample)
            else:
                left.append(sample)
        packs.append(pack)
        held = left
    return packs


def first_fit_decreasing(tokens: IntArray, tiles: IntArray, max_tokens: int, max_tiles: int, *, seed: int = 0) -> Packs:
    """Offline: all samples, the largest share of a cap first, each into the first pack that takes it; then shuffled."""
    share = np.maximum(tokens / max_tokens, tiles / max_tiles)
    token_room = np.full(len(tokens), max_tokens)
    tile_room = np.full(len(tokens), max_tiles)
    packs: Packs = []
    for sample in np.argsort(-share, kind="stable").tolist():
        opened = len(packs) + 1
        number = int(((token_room[:opened] >= tokens[sample]) & (tile_room[:opened] >= tiles[sample])).argmax())
        if number == len(packs):
            packs.append([])
        packs[number].append(sample)
        token_room[number] -= tokens[sample]
        tile_room[number] -= tiles[sample]
    order = np.random.default_rng(seed).permutation(len(packs))
    return [packs[number] for number in order]
