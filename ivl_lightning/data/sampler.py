"""Samplers over items that were dealt beforehand, and the loader that goes with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


class FixedSampler(DistributedSampler[Any]):
    """Yields the given items, which are already this rank's own.

    It is a DistributedSampler so that Lightning, which deals the items of any other sampler to the ranks a second time,
    leaves it alone.

    Args:
        items: what the loader hands to the dataset, in order.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class StreamSampler(DistributedSampler[Any]):
    """Yields items while they are planned; how many there will be is not known.

    Args:
        plan: begins the stream of this rank's own items anew. Lightning may begin an epoch's loader twice.
    """

    def __init__(self, plan: Callable[[], Iterator[Any]]) -> None:
        self.plan = plan
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        return self.plan()

    def __len__(self) -> int:
        # What Python says of a stream, and what Lightning takes for "unknown".
        raise TypeError("a stream of planned packs has no length")


class PlannedLoader(DataLoader[Any]):
    """A loader that continues where a checkpoint stopped, and says how long training waited for it.

    The data module keeps the position and gives a fresh loader the rest of the epoch, so there is no state here; its
    presence tells Lightning that continuing in the middle of an epoch is safe.

    Attributes:
        waited: seconds spent waiting for batches so far.
    """

    waited = 0.0

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see above."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take back."""


def whole_item(item: Any) -> Any:
    """Collates nothing: what a dataset hands over is a whole batch already."""
    return item
