"""An epoch's order of samples, from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.config.schema import RepeatRule


def epoch_order(
    sizes: Sequence[int], repeats: Sequence[float], *, seed: int, epoch: int, rule: RepeatRule = "random"
) -> NDArray[np.int64]:
    """Sample numbers of an epoch, shuffled.

    Rows are numbered over all N rows of all datasets laid end to end; the k-th use of a row within the epoch is sample
    row + k * N, so that each use has its own number (and its own augmentation) and `sample % N` is the row.

    A dataset of n rows with `repeat_time` r gives int(n * r) samples: every row floor(r) times, and of the rest a
    random subset that is new in each epoch (`random`), or the first rows of the file (`prefix`, official for r < 1).

    Args:
        sizes: usable rows of each dataset.
        repeats: `repeat_time` of each.
        seed, epoch: the only source of randomness.
        rule: which rows a fraction takes.
    """
    rng = np.random.default_rng([seed, epoch])
    chosen: list[NDArray[np.int64]] = []
    num_rows = sum(sizes)
    start = 0
    for size, repeat in zip(sizes, repeats, strict=True):
        whole, rest = divmod(int(size * repeat), size) if size else (0, 0)
        fraction = rng.permutation(size)[:rest] if rule == "random" else np.arange(rest)
        uses = [start + use * num_rows + np.arange(size) for use in range(whole)]
        chosen.extend([*uses, start + whole * num_rows + fraction])
        start += size
    return rng.permutation(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def epoch_size(sizes: Sequence[int], repeats: Sequence[float]) -> int:
    """Samples of every epoch: sum of int(n * r)."""
    return sum(int(size * repeat) for size, repeat in zip(sizes, repeats, strict=True))
