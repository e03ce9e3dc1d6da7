"""Training killed with SIGKILL at random moments, and started again, gives bit for bit what an unbroken run gives.

See `kill_cases`: one process, DDP and FSDP on two gloo ranks, loader workers, and saves that go on behind training.
"""

import json
import random
from pathlib import Path

import pytest

from tests.commands import run_module
from tests.faults.kill_cases import LAYOUTS, PACKS, STEPS

ROOT = Path(__file__).parents[2]
FEW = ("single:1:2", "ddp:1:signal", "behind:1:2")


def results(folder, seed, *cases, timeout):
    process = run_module("tests.faults.kill_cases", folder, seed, *cases, timeout=timeout)
    assert process.returncode == 0, f"seed {seed}: {process.stderr[-6000:]}"
    return json.loads((folder / "results.json").read_text())


def check(found, case):
    """Every micro-batch of every attempt has the loss, the samples and the random numbers of the unbroken run.

    A micro-batch that a kill has cost is trained twice, and both times alike; none is left out; and the weights at the
    end are the same to the last bit. Each step's loss is in the metrics file, also where a kill has
    followed its checkpoint. The newest checkpoints are kept, and nothing that a save has left unfinished; no attempt
    begins before the one before it, so there never was a moment without a whole one.
    """
    whole, layout = found["whole"], LAYOUTS[case.partition(":")[0]]
    kept = ["step=00000006.ckpt", "step=00000008.ckpt"][-layout.keep :]
    for run in found["killed"]:
        shown = (case, run["kills"], run["begins"])
        assert run["weights"] == whole["weights"], shown
        assert run["logged"] == whole["logged"], shown
        assert [step for step, _ in run["logged"]] == list(range(1, STEPS + 1)), shown
        for rank, lines in run["lines"].items():
            wanted = {tuple(key): values for key, *values in whole["lines"][rank]}
            assert len(wanted) == len(whole["lines"][rank]) == STEPS * PACKS // layout.ranks
            assert {tuple(key) for key, *_ in lines} == wanted.keys(), shown
            for key, *values in lines:
                assert values == wanted[tuple(key)], (shown, rank, key)
        assert run["kept"] == whole["kept"] == kept, shown
        assert run["begins"] == sorted(run["begins"]), shown


def check_signal(found, case, step):
    """All ranks end with exit code 75 behind the same step; no micro-batch is trained twice."""
    ranks = LAYOUTS[case.partition(":")[0]].ranks
    for run in found["killed"]:
        assert run["codes"] == [[75] * ranks, [0] * ranks]
        assert run["begins"] == [0, step]
        assert all(len(lines) == STEPS * PACKS // ranks for lines in run["lines"].values())


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Each layout whole, and killed twice in a row or stopped; at the same moments in every run of the suite."""
    return results(tmp_path_factory.mktemp("kills"), 3, *FEW, timeout=300)


@pytest.mark.parametrize("case", FEW)
def test_broken_off_equals_unbroken(few, case):
    check(few[case], case)
    assert len(few[case]["killed"][0]["begins"]) > 1, "nothing was killed"


def test_a_signal_to_one_rank_stops_all_behind_the_step(few):
    """SIGUSR1 within step 3, counted from 1, on the last rank."""
    check_signal(few["ddp:1:signal"], "ddp:1:signal", 3)


def test_some_attempt_goes_on_in_the_middle(few):
    """Else all would have begun anew, and nothing would have been resumed."""
    begins = [step for found in few.values() for run in found["killed"] for step in run["begins"]]
    assert any(0 < step < STEPS for step in begins)


@pytest.mark.soak
@pytest.mark.parametrize("name", LAYOUTS)
def test_many_random_kills(tmp_path, name):
    """Other moments each time; the seed is in the message of a failure."""
    seed = random.SystemRandom().randrange(10**6)
    killed, stopped = f"{name}:5:2", f"{name}:1:validation"
    found = results(tmp_path, seed, killed, stopped, timeout=1200)
    check(found[killed], killed)
    check(found[stopped], stopped)
    check_signal(found[stopped], stopped, 5)
    kills = sum(len(run["begins"]) - 1 for run in found[killed]["killed"])
    print(f"{name}, seed {seed}: {kills} kills, no mismatch")
    assert kills >= 5
