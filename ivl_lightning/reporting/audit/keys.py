"""Numbers that are equal for equal rows, pictures or answers, and what is found by comparing them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.structures import Turn


def row_key(turns: Iterable[Turn], media: Iterable[str]) -> bytes:
    """16 bytes that are equal for rows of equal questions, answers and media, and for no others in practice.

    Media count by their place: a copy of a picture under another name is another picture.

    Args:
        turns: of the row.
        media: absolute places of its pictures or its video.
    """
    return _hash([*media, "", *(part for turn in turns for part in (turn.role, turn.text))], 16)


def text_key(parts: Iterable[str]) -> int:
    """A 64-bit number for counting equal texts."""
    return int.from_bytes(_hash(parts, 8), "little")


def _hash(parts: Iterable[str], size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = part.encode()
        # With its length in front, so that no two lists of parts run together to the same bytes.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def duplicates(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows whose key an earlier row has, ascending, and that first row of each.

    Keys of the rows 0 to 4 that are a, b, a, c, a give the later rows 2, 4 with the first rows 0, 0.

    Args:
        keys: `[n, 2]`, the 16 bytes of `row_key` of each row.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    same = np.zeros(len(keys), dtype=bool)
    same[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    # Sorting is stable, so the first row of a run of equal keys is the earliest.
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(keys))))]
    later = order[same]
    ascending = np.argsort(later)
    return later[ascending], first[same][ascending]


def most_frequent(keys: NDArray[np.uint64]) -> tuple[int, int]:
    """How often the most frequent key stands there, and where first; (0, 0) of nothing."""
    if not len(keys):
        return 0, 0
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    best = int(np.argmax(counts))
    return int(counts[best]), int(first[best])
