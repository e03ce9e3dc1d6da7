"""Two ranks that meet a sample whose loss is no number, and at last a picture that never comes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import tiny
from tests.commands import run_module
from tests.faults.bad_step_cases import STAGE
from tests.faults.poisoned import ROW, check_file, check_same, poisoned_arguments
from tests.faults.stall_cases import STALLED_ROW, slow_server


class Ended(NamedTuple):
    """What is left of the two ranks: what each saw of the bad steps, and the end."""

    folder: Path
    seen: dict[str, list[dict[str, Any]]]
    code: int
    errors: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Both ranks are started once."""
    folder = tmp_path_factory.mktemp("two_ranks")
    data = folder / "stall/data"
    with slow_server(data, seconds=600.0) as address:
        tiny.write_tiny_data(data, root=address)
        arguments = poisoned_arguments(folder / "poisoned")
        process = run_module("tests.faults.two_rank_cases", folder, *arguments, timeout=240, ranks=2)
    assert (folder / "ranks.pt").is_file(), process.stderr[-4000:]
    seen = torch.load(folder / "ranks.pt", weights_only=True)
    return Ended(folder, seen, process.returncode, process.stderr)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_both_ranks_stop_before_the_update(ended: Ended, strategy: str) -> None:
    """In front of the same step, with the same words, whichever has the sample; what one runs again is as it was."""
    first, second = ended.seen[strategy]
    bad = len(first["taken"])
    assert first["error"] == second["error"]
    assert ROW in first["error"]
    for seen in (first, second):
        assert seen["stopped"] == seen["taken"][bad - 1]["weights"]
    stage = ended.folder / strategy / STAGE
    check_file(stage / f"bad_steps/step={bad:08d}.json", bad, ranks=2)
    if strategy == "ddp":
        check_file(stage / f"replay/step={bad:08d}/replay.json", bad, ranks=2)
    else:
        check_same(stage / f"replay/step={bad - 1:08d}/replay.json", first["taken"][bad - 1])


def test_shards_have_the_norm_of_the_whole(ended: Ended) -> None:
    """Each rank of FSDP adds the squares of its shards, each of DDP half of all."""
    ddp, fsdp = (ended.seen[strategy][0]["taken"] for strategy in ("ddp", "fsdp"))
    assert len(ddp) == len(fsdp) == 2
    for step, seen in ddp.items():
        assert fsdp[step]["norm"] == pytest.approx(seen["norm"], rel=1e-5)


def test_a_rank_that_waits_is_named(ended: Ended) -> None:
    """A loader process of one rank waits for the picture, and the other rank for that rank; the watchdog ends both.

    The strategy is said to time out before that, which the watchdog says.
    """
    assert ended.code == 1
    assert "minutes=0.05 is not below strategy.timeout_minutes=0.01" in ended.errors
    slow = re.search(
        r"rank (\d) \(.*\) has been waiting for data for .*; records: (.*); being read: (.*)", ended.errors
    )
    assert slow is not None, ended.errors[-4000:]
    assert STALLED_ROW in slow[2]
    assert re.match(rf"pictures .*{STALLED_ROW} for \d+ s", slow[3])
    assert f"rank {1 - int(slow[1])}: in forward or backward, " in ended.errors
    assert f"held up by rank {slow[1]}" in ended.errors
    assert "error: rank" in ended.errors
    folder = ended.folder / "stall"
    assert "Thread" in (folder / f"stall-rank-{slow[1]}.txt").read_text()
