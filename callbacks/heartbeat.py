"""What each rank does and since when, in small files that the others can read: ranks of a stalled run cannot talk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ivl_lightning.whole_files import write_whole

WAITING = "waiting for data"
_RECORDS_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One rank at one moment.

    Attributes:
        rank, host, pid: who.
        beat: rises with each heartbeat.
        batches: micro-batches that were begun so far; the rank with the fewest is behind.
        step: finished optimizer steps.
        phase: what it does, for people: `waiting for data`, `in forward or backward`, ...
        seconds: since when.
        records: rows that it waits for or works on.
        reading: row -> seconds that a loader process has been reading it.
    """

    rank: int
    host: str
    pid: int
    beat: int
    batches: int
    step: int
    phase: str
    seconds: float
    records: tuple[str, ...] = ()
    reading: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it whole or not at all."""
        write_whole(_file(folder, self.rank), json.dumps(asdict(self), ensure_ascii=False))

    def told(self) -> str:
        """One line for people."""
        line = f"{self.phase} for {self.seconds:.0f} s, behind step {self.step}"
        if self.records:
            line += f"; records: {_listed(self.records)}"
        if self.reading:
            longest = sorted(self.reading.items(), key=lambda item: -item[1])
            line += f"; being read: {_listed([f'{name} for {seconds:.0f} s' for name, seconds in longest])}"
        return line


def read_heartbeats(folder: Path, ranks: int) -> dict[int, Heartbeat]:
    """The last heartbeat of each rank that has left one."""
    found = {}
    for rank in range(ranks):
        try:
            content = json.loads(_file(folder, rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        found[rank] = Heartbeat(**{**content, "records": tuple(content["records"])})
    return found


def behind(beats: Mapping[int, Heartbeat]) -> list[int]:
    """Ranks that the others wait for: those that have begun the fewest micro-batches, if not all have begun as many;
    among equals those that wait for data, if not all do. All ranks where none stands out.
    """
    fewest = min(beat.batches for beat in beats.values())
    last = [rank for rank, beat in beats.items() if beat.batches == fewest]
    waiting = [rank for rank in last if beats[rank].phase == WAITING]
    return waiting or last


def diagnosis(before: Mapping[int, Heartbeat], now: Mapping[int, Heartbeat], ranks: int) -> list[str]:
    """Who holds up whom, line by line.

    Args:
        before, now: heartbeats of two moments, further apart than heartbeats are.
        ranks: how many there should be.
    """
    lost = [
        rank for rank in range(ranks) if rank not in now or (rank in before and before[rank].beat == now[rank].beat)
    ]
    lines = []
    for rank in lost:
        last = f", was last {now[rank].told()}" if rank in now else ""
        place = f" ({now[rank].host}, pid {now[rank].pid})" if rank in now else ""
        lines.append(f"rank {rank}{place} gives no sign of life{last}")
    alive = {rank: beat for rank, beat in now.items() if rank not in lost}
    if not alive:
        return lines
    slow = behind(alive)
    lines += [f"rank {rank} ({alive[rank].host}, pid {alive[rank].pid}) has been {alive[rank].told()}" for rank in slow]
    others: dict[str, list[int]] = {}
    for rank, beat in alive.items():
        if rank not in slow:
            others.setdefault(f"{beat.phase}, behind step {beat.step}", []).append(rank)
    if others:
        who = slow if not lost else [*lost, *slow]
        awaited = f"rank {who[0]}" if len(who) == 1 else "those ranks"
        lines += [f"{_ranks(numbers)}: {phase}, held up by {awaited}" for phase, numbers in others.items()]
    return lines


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _RECORDS_SHOWN} more" if len(names) > _RECORDS_SHOWN else ""
    return ", ".join(names[:_RECORDS_SHOWN]) + more


def _ranks(numbers: Sequence[int]) -> str:
    """`rank 4`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'' if len(numbers) == 1 else 's'} {shown}"
