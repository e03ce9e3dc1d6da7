"""Samplers over items that were dealt beforehand, and the loader that goes with them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ivl_lightning.data.reading import Reading


@dataclass(frozen=True, slots=True)
class Waiting:
    """What training waits for.

    Attributes:
        seconds: since when.
        records: names of the rows of the batch that comes next.
        reading: row -> seconds that a loader process has been reading it; of rows of this and of later batches.
    """

    seconds: float
    records: tuple[str, ...]
    reading: dict[str, float]


class PlannedSampler(DistributedSampler[Any]):
    """Yields items that are already this rank's own, and knows which of them have been asked for and not come back.

    It is a DistributedSampler so that Lightning, which deals the items of any other sampler to the ranks a second time,
    leaves it alone.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.asked_for: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.asked_for.clear()
        for item in self._items():
            self.asked_for.append(item)
            yield item

    def _items(self) -> Iterable[Any]:
        raise NotImplementedError


class FixedSampler(PlannedSampler):
    """Yields the given items.

    Args:
        items: what the loader hands to the dataset, in order.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__()
        self.items = items

    def _items(self) -> Iterable[Any]:
        return self.items

    def __len__(self) -> int:
        return len(self.items)


class StreamSampler(PlannedSampler):
    """Yields items while they are planned; how many there will be is not known.

    Args:
        plan: begins the stream of this rank's own items anew. Lightning may begin an epoch's loader twice.
    """

    def __init__(self, plan: Callable[[], Iterator[Any]]) -> None:
        super().__init__()
        self.plan = plan

    def _items(self) -> Iterable[Any]:
        return self.plan()

    def __len__(self) -> int:
        # What Python says of a stream, and what Lightning takes for "unknown".
        raise TypeError("a stream of planned packs has no length")


class NamedRows(Dataset[Any]):
    """A dataset that knows the names of the rows it reads; see `dataset.CorpusDataset`.

    Attributes:
        notes: of the processes that read; a loader puts those of its own processes in the place.
    """

    notes: Reading

    def names(self, item: Any) -> tuple[str, ...]:
        """Names of the rows that an item of the sampler needs."""
        raise NotImplementedError

    def reading(self) -> dict[str, float]:
        """Name of each row that is being read now -> seconds since when."""
        raise NotImplementedError


class PlannedLoader(DataLoader[Any]):
    """A loader that continues where a checkpoint stopped, and says how long training waited for it, and for what.

    Args:
        dataset: knows its rows' names.
        **options: of a DataLoader, with a sampler of this module.

    The data module keeps the position and gives a fresh loader the rest of the epoch, so there is no state here; its
    presence tells Lightning that continuing in the middle of an epoch is safe.

    Attributes:
        waited: seconds spent waiting for batches so far.
    """

    waited = 0.0
    _since: float | None = None
    dataset: NamedRows

    def __init__(self, dataset: NamedRows, **options: Any) -> None:
        super().__init__(dataset, **options)
        dataset.notes = Reading(self.num_workers)

    def __iter__(self) -> Any:
        batches = super().__iter__()
        sampler = self.sampler
        assert isinstance(sampler, PlannedSampler)
        while True:
            start = self._since = time.monotonic()
            batch = next(batches, None)
            self._since = None
            self.waited += time.monotonic() - start
            if batch is None:
                return
            # Batches come in the order in which they were asked for.
            sampler.asked_for.popleft()
            yield batch

    def waiting(self) -> Waiting | None:
        """What is waited for now; None while nobody waits. For other threads."""
        since, sampler = self._since, self.sampler
        assert isinstance(sampler, PlannedSampler)
        if since is None:
            return None
        asked_for = list(sampler.asked_for)
        records = self.dataset.names(asked_for[0]) if asked_for else ()
        return Waiting(time.monotonic() - since, records, self.dataset.reading())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see above."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take back."""


def whole_item(item: Any) -> Any:
    """Collates nothing: what a dataset hands over is a whole batch already."""
    return item
