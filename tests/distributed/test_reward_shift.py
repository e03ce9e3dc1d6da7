"""The running reward shift over two gloo ranks: the official mean, and one that does not depend on the layout."""

from pathlib import Path

import pytest
import torch

from ivl_lightning.losses.quality import BCOPair
from tests.commands import run_module
from tests.distributed.shift_cases import RANKS, STEPS, follow, random_batch

ROOT = Path(__file__).parents[2]

# Shift, sigmoid and BCO of two micro-batches on each rank: mean (0.6 - 0.1) / 2, then (0.25 + (1.5 - 0.5) / 2) / 2.
WORKED = [
    [(0.25, 0.371101, 1.055331), (0.375, 0.313262, 1.233445)],
    [(0.25, 0.313262, 0.976822), (0.375, 0.313262, 1.123536)],
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both ranks start once and loop over their cases."""
    out = tmp_path_factory.mktemp("shift") / "results.pt"
    process = run_module("tests.distributed.shift_cases", out, timeout=120, ranks=RANKS)
    assert process.returncode == 0, process.stderr[-4000:]
    return torch.load(out, weights_only=True)


def test_worked_table_on_two_ranks(results):
    """Each rank's micro-batch counts once, and both ranks use the same shift."""
    for rank in range(RANKS):
        for ours, wanted in zip(results[rank]["worked"], WORKED[rank], strict=True):
            assert ours == pytest.approx(wanted, abs=1e-6)


def test_a_step_does_not_depend_on_the_layout(results):
    """One micro-batch on each of two ranks equals two micro-batches on one rank: losses, shift and count."""
    steps = [[random_batch(rank, step) for rank in range(RANKS)] for step in range(STEPS)]
    alone = follow(BCOPair(update="step"), steps)
    assert [count for *_, count in alone] == [8.0, 11.0, 19.0]
    for step, (loss, *state) in enumerate(alone):
        ranks = [results[rank]["random/step"][step] for rank in range(RANKS)]
        assert sum(loss for loss, *_ in ranks) == pytest.approx(loss, rel=1e-12)
        assert [list(state) for _, *state in ranks] == [pytest.approx(state, rel=1e-12)] * RANKS


def test_pairs_count_once_on_any_rank(results):
    """`pair` ends at the mean over all pairs of all ranks, as `step` does, but uses it earlier."""
    for rank in range(RANKS):
        ours, stepped = results[rank]["random/pair"], results[rank]["random/step"]
        assert ours[-1][1:] == pytest.approx(stepped[-1][1:], rel=1e-12)
        assert ours[0][0] != pytest.approx(stepped[0][0], rel=1e-6)


@pytest.mark.parametrize("update", ["micro_batch", "pair", "step"])
def test_a_rank_without_a_pair_takes_part(results, update):
    """Rank 0 has the rewards (1, 0), rank 1 nothing, then both nothing: the mean is 0.5, of one, on both ranks."""
    for rank in range(RANKS):
        states = results[rank][f"one_sided/{update}"]
        assert [state[1:] for state in states] == [pytest.approx((0.5, 1.0))] * 2
