"""A loader that waits for a picture that does not come: the watchdog names rank and row, and may end the run."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ivl_lightning.callbacks.heartbeat import Heartbeat, diagnosis
from ivl_lightning.callbacks.watchdog import Watchdog
from ivl_lightning.data.datamodule import datamodule_of
from tests import tiny
from tests.faults.stall_cases import STALLED_ROW, fit, slow_server

BEATS = {rank: Heartbeat(rank, "node", 100 + rank, 5, 80, 40, "in forward or backward", 611.0) for rank in range(4)}
WAITS = replace(
    BEATS[3], batches=79, phase="waiting for data", seconds=612.0, records=("demo d.jsonl:17", "demo d.jsonl:99")
)


def test_a_late_picture_is_named_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loading process itself reads; the picture is 3 s late and 1 s is allowed."""
    folder = tmp_path / "data"
    with slow_server(folder, seconds=3.0) as address, caplog.at_level(logging.WARNING, "ivl_lightning"):
        tiny.write_tiny_data(folder, root=address)
        trainer = fit(tmp_path, Watchdog(minutes=1 / 60, every_seconds=0.2), ranks=1, workers=0)
    assert datamodule_of(trainer).ledger.counted == 0
    told = "\n".join(record.getMessage() for record in caplog.records)
    named = rf"records: .*{STALLED_ROW}.*; being read: .*{STALLED_ROW} for"
    assert re.search(rf"rank 0 .* has been waiting for data for \d s, .*; {named}", told)
    assert "rank 0 goes on" in told
    stacks = (tmp_path / "stall-rank-0.txt").read_text()
    assert "data/media.py" in stacks
    assert not (tmp_path / "heartbeats").exists(), "the run has ended"


def test_who_holds_up_whom() -> None:
    """Rank 3 has begun a micro-batch less than the others, so they wait for it, wherever they are."""
    assert diagnosis({}, {**BEATS, 3: WAITS}, 4) == [
        "rank 3 (node, pid 103) has been waiting for data for 612 s, behind step 40; "
        "records: demo d.jsonl:17, demo d.jsonl:99",
        "ranks 0-2: in forward or backward, behind step 40, held up by rank 3",
    ]


def test_a_rank_without_a_sign_of_life() -> None:
    """Rank 2 has not beaten between two looks, rank 1 never; 0 and 3 are where they should be."""
    before = {rank: replace(beat, beat=4) for rank, beat in BEATS.items() if rank != 1}
    now = {**before, 0: BEATS[0], 3: BEATS[3]}
    assert [line.partition(" for ")[0] for line in diagnosis(before, now, 4)] == [
        "rank 1 gives no sign of life",
        "rank 2 (node, pid 102) gives no sign of life, was last in forward or backward",
        "rank 0 (node, pid 100) has been in forward or backward",
        "rank 3 (node, pid 103) has been in forward or backward",
    ]


@pytest.mark.parametrize("setting", ["minutes", "every_seconds"])
def test_times_are_above_zero(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=0"):
        Watchdog(**{setting: 0.0})
