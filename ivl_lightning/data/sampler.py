"""A sampler over items that were planned and dealt beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


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


class PlannedLoader(DataLoader[Any]):
    """A loader that continues where a checkpoint stopped.

    The data module keeps the position and gives a fresh loader the rest of the epoch, so there is no state here; its
    presence tells Lightning that continuing in the middle of an epoch is safe.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see above."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take back."""
