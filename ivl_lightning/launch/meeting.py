"""Where the launching processes of a command meet: rank 0 gives orders, all say how their stage ended."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# How often a waiting process looks; a call that blocks inside torch would hear no signal.
_POLL_SECONDS = 0.2
# Others may still import torch when rank 0 is there, or the other way round.
_CONNECT = timedelta(minutes=10)
# How long rank 0, whose store others read, waits for them in the end.
_PART_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Order:
    """What all ranks do next.

    Attributes:
        folder: of the stage to run; None ends the command.
        exit_code: of the command.
    """

    folder: str | None = None
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How the process of a stage ended on one rank.

    Attributes:
        rank: of the launching process.
        code: exit code of the stage's process; negative: killed by this signal.
        signals: names of the signals that reached the launching process.
        host: where.
    """

    rank: int
    code: int
    signals: list[str] = field(default_factory=list)
    host: str = field(default_factory=socket.gethostname)


class LostRankError(RuntimeError):
    """The process that keeps the meeting point is gone."""


class Meeting:
    """A store of torch's, with one entry for each order and for each rank's end of it.

    It lies where torch's own `env://` rendezvous has it: in torchrun's agent if that shares its store (no further
    port is needed, and it outlives rank 0), else in rank 0.

    Args:
        ranks: of this process.
        attempt: how often torchrun has started all ranks again; each has entries of its own.

    Raises:
        ConfigError: the place cannot be made or reached.
    """

    def __init__(self, ranks: Ranks, attempt: str = "0") -> None:
        from torch.distributed.distributed_c10d import PrefixStore

        self._store: Store = PrefixStore(f"ivl_lightning/{attempt}", _store(ranks))
        self._ranks = ranks
        self._round = 0

    def give(self, order: Order) -> None:
        """Rank 0: say what all do next."""
        self._round += 1
        self._store.set(f"order/{self._round}", json.dumps(asdict(order)))

    def take(self, gives_up: Callable[[], bool]) -> Order | None:
        """Another rank: wait for what to do next, however long rank 0 prepares it; None after giving up.

        Raises:
            LostRankError: rank 0 is gone.
        """
        self._round += 1
        while not self._has(f"order/{self._round}"):
            if gives_up():
                return None
            time.sleep(_POLL_SECONDS)
        return Order(**json.loads(self._store.get(f"order/{self._round}")))

    def report(self, ended: Ended, *, failed: bool) -> None:
        """Say how this rank's stage ended; the first failure ends it on the others."""
        told = json.dumps(asdict(ended))
        if failed:
            self._store.compare_set(f"failure/{self._round}", "", told)
        self._store.set(f"ended/{self._round}/{ended.rank}", told)

    def failure(self) -> Ended | None:
        """The rank whose stage failed first, if any has.

        Raises:
            LostRankError: rank 0 is gone.
        """
        if not self._has(f"failure/{self._round}"):
            return None
        return Ended(**json.loads(self._store.get(f"failure/{self._round}")))

    def ends(self, seconds: float | None = None) -> list[Ended]:
        """Rank 0: how the stage ended on each rank, rank by rank, without those that have not said so.

        Args:
            seconds: how long to wait; None: as long as it takes, or until one has failed.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        return [
            Ended(**json.loads(self._store.get(key)))
            for rank in range(self._ranks.world_size)
            if self._wait_for(key := f"ended/{self._round}/{rank}", deadline)
        ]

    def _wait_for(self, key: str, deadline: float | None) -> bool:
        while not self._has(key):
            given_up = self.failure() is not None if deadline is None else time.monotonic() > deadline
            if given_up:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def part(self) -> None:
        """The last thing to do here; a store of rank 0's stays until the others have read what it said."""
        if self._ranks.store_of_starter:
            return
        if self._ranks.rank > 0:
            self._store.add("parted", 1)
            return
        deadline = time.monotonic() + _PART_SECONDS
        while self._store.add("parted", 0) < self._ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _has(self, key: str) -> bool:
        from torch.distributed import DistNetworkError

        try:
            return self._store.check([key])
        except DistNetworkError as error:
            raise LostRankError(f"rank 0 on {self._ranks.host} does not answer any more, so this one ends") from error


def _store(ranks: Ranks) -> Store:
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # of torch's C library

    keeps_it = ranks.rank == 0 and not ranks.store_of_starter
    try:
        store: Store = TCPStore(ranks.host, ranks.port, is_master=keeps_it, wait_for_workers=False, timeout=_CONNECT)
    except DistError as error:
        what = "cannot listen at" if keeps_it else "does not reach rank 0 at"
        raise ConfigError(
            f"rank {ranks.rank} {what} MASTER_ADDR={ranks.host}, MASTER_PORT={ranks.port}: {error}. Choose a port that "
            "is free there, with no firewall between the machines"
        ) from error
    return store
