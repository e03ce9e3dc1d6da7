"""Which row each loader process is reading, and since when: it names the medium that a stalled run waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import get_worker_info

_NOTHING = -1.0


class Reading:
    """Notes of the processes that read for one loader, in memory that they share.

    Args:
        workers: loader processes; with 0 the loading process itself reads.
    """

    def __init__(self, workers: int = 0) -> None:
        # Row and time; a monotonic clock is the same in all processes of a machine.
        self._notes = torch.full((max(workers, 1), 2), _NOTHING, dtype=torch.float64).share_memory_()

    @contextmanager
    def note(self, row: int) -> Iterator[None]:
        """Say that this process reads a row, as long as it does."""
        worker = get_worker_info()
        own = self._notes[0 if worker is None else worker.id]
        own[0], own[1] = row, time.monotonic()
        try:
            yield
        finally:
            own[0] = _NOTHING

    def rows(self) -> dict[int, float]:
        """Row -> seconds that it has been read, of all processes that read now."""
        now = time.monotonic()
        return {int(row): now - since for row, since in self._notes.tolist() if row != _NOTHING}
