"""A sampler over items that were planned and dealt beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DistributedSampler


class FixedSampler(DistributedSampler[Any]):
    """Yields the given items, which are already this rank's own.

    It is a DistributedSampler so that Lightning, which deals the items of any other sampler to the ranks a second time,
    leaves it alone.

    Args:
        items: what the loader hands to the dataset, in order.
        length: reported length where `items` is only the rest of an epoch; Lightning counts batches of the epoch.
    """

    def __init__(self, items: Sequence[Any], length: int | None = None) -> None:
        self.items = items
        self.length = len(items) if length is None else length
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return self.length
