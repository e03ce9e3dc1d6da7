"""Preference training is the same on any layout: 1 rank x 4 packs, 2 x 2 and 4 x 1, DDP and FSDP2, on gloo ranks."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.commands import run_module

ROOT = Path(__file__).parents[2]
SINGLE = ["single/cached/whole", "single/online/whole", "single/online/one_pack"]
# Those that share a process group with a case that fails would fail with it: what is most likely to stands last.
TWO_RANKS = [
    "ddp/cached/whole",
    "ddp/cached/exploding",
    "ddp/cached/resume1",
    "fsdp/online/whole",
    "fsdp/cached/whole",
    "fsdp/cached/answers",
]
FOUR_RANKS = ["ddp/cached/whole"]
LAYOUTS = [(2, case) for case in TWO_RANKS if case.endswith("whole")] + [(4, case) for case in FOUR_RANKS]


class Group:
    """What a group of ranks has written."""

    def __init__(self, folder: Path, world_size: int) -> None:
        path = folder / f"{world_size}.pt"
        self.found = torch.load(path, weights_only=True) if path.is_file() else {}
        self.logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob(f"{world_size}-*.log")))

    def __getitem__(self, case: str) -> dict:
        if case not in self.found:
            pytest.fail(f"{case} did not end: {self.logs}")
        return self.found[case]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """One process first, from whose checkpoint two ranks go on."""
    folder = tmp_path_factory.mktemp("preferences")
    meta = tiny.write_tiny_pairs(folder / "data")
    cases = {1: SINGLE, 2: TWO_RANKS, 4: FOUR_RANKS}
    sizes = (f"{size}:{','.join(names)}" for size, names in cases.items())
    process = run_module("tests.distributed.preference_cases", meta, folder, *sizes, timeout=240)
    assert process.returncode == 0, process.stderr[-3000:]
    return {size: Group(folder, size) for size in cases}


def test_the_epoch_has_uneven_packs_and_an_empty_one(groups):
    """19 pairs, 8 a step: steps of 8, 8 and 3, the last one's on three of four packs. Each pair once."""
    whole = groups[1][SINGLE[0]]
    assert [step for step, _ in whole["pairs"]] == [0] * 8 + [1] * 8 + [2] * 3
    assert len({name for _, name in whole["pairs"]}) == 19
    assert whole["empty"] == 1


@pytest.mark.parametrize(("world_size", "case"), [*LAYOUTS, (1, SINGLE[2])])
def test_layout_changes_nothing(groups, world_size, case):
    """The same pairs in each step, the losses of three steps, and all gradients of the first.

    One pack is the sum over a step's pairs by definition: uneven packs must not weigh their pairs unevenly.
    """
    ours, wanted = groups[world_size][case], groups[1][SINGLE[0]]
    assert ours["pairs"] == wanted["pairs"]
    assert ours["empty"] == (0 if "one_pack" in case else 1)
    assert len(ours["losses"]) == 3
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert ours["gradients"].keys() == wanted["gradients"].keys()
    assert len(wanted["gradients"]) > 30
    for name, gradient in ours["gradients"].items():
        torch.testing.assert_close(gradient, wanted["gradients"][name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("world_size", "case"), [*LAYOUTS, *((1, case) for case in SINGLE)])
def test_the_shift_is_the_mean_reward_of_all_pairs(groups, world_size, case):
    """d behind step s = sum over steps of pairs x (r_c + r_r) / 2, over all pairs so far; the same bits on every rank.

    The policy begins as the reference, so the first step's rewards are 0 and only the later ones move d. Rewards are
    float32, a tenth of a difference of log-probabilities of about -50.
    """
    by_rank = groups[world_size][case]["steps"]
    assert len(by_rank) == world_size
    assert all([step["mean"] for step in steps] == [step["mean"] for step in by_rank[0]] for steps in by_rank)
    total = pairs = 0.0
    for step, count in zip(by_rank[0], (8, 8, 3), strict=True):
        total += count * (step["train/rewards_chosen"] + step["train/rewards_rejected"]) / 2
        pairs += count
        assert step["count"] == pairs
        assert step["mean"] == pytest.approx(total / pairs, abs=1e-6)
    assert by_rank[0][0]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert abs(by_rank[0][2]["mean"]) > 0.01
    wanted = groups[1][SINGLE[0]]["steps"][0]
    assert [step["mean"] for step in by_rank[0]] == pytest.approx([step["mean"] for step in wanted], abs=1e-6)


@pytest.mark.parametrize(("world_size", "case"), LAYOUTS)
def test_rewards_are_logged_for_the_whole_step(groups, world_size, case):
    """What rank 0 logs is of all pairs of the step, whoever has them.

    In the first step chosen and rejected rewards are both 0, so rounding decides which is larger.
    """
    ours, wanted = groups[world_size][case]["steps"][0], groups[1][SINGLE[0]]["steps"][0]
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("reward_margin", "rewards_chosen", "rewards_rejected", "logps_chosen", "loss_quality"):
            assert mine[f"train/{name}"] == pytest.approx(theirs[f"train/{name}"], rel=1e-5, abs=1e-6), name
    accuracies = [[step["train/reward_accuracy"] for step in steps[1:]] for steps in (ours, wanted)]
    assert accuracies[0] == accuracies[1]
    assert min(accuracies[0]) > 0.5


@pytest.mark.parametrize(("world_size", "case"), LAYOUTS)
def test_validation_is_the_same(groups, world_size, case):
    """Five pairs held back; a rank may have none of them."""
    ours, wanted = groups[world_size][case]["validation"], groups[1][SINGLE[0]]["validation"]
    assert {"val/loss", "val/reward_accuracy", "val/reward_margin", "val/loss_generation"} <= ours.keys()
    assert ours == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_cached_equals_online(groups):
    """The reference beside the policy gives what it gave in the pass before training; online writes no cache."""
    cached, online = (groups[1][case] for case in SINGLE[:2])
    assert online["losses"] == pytest.approx(cached["losses"], rel=1e-6)
    assert online["validation"] == pytest.approx(cached["validation"], rel=1e-5, abs=1e-6)
    assert online["parts"] == []
    assert cached["parts"]


def test_more_ranks_go_on_with_shift_and_reference(groups):
    """Two ranks behind step 1 of one process: its pairs, losses and shift; its reference is not computed again."""
    ours, wanted = groups[2]["ddp/cached/resume1"], groups[1][SINGLE[0]]
    assert ours["losses"] == pytest.approx(wanted["losses"][1:], rel=1e-5)
    assert ours["pairs"] == wanted["pairs"][8:]
    for mine, theirs in zip(ours["steps"][0], wanted["steps"][0][1:], strict=True):
        assert mine["count"] == theirs["count"]
        assert mine["mean"] == pytest.approx(theirs["mean"], abs=1e-6)
    assert ours["parts"] == wanted["parts"]


def test_all_ranks_stop_on_exploding_rewards(groups):
    """No reward beyond 1e-4: step 1, the first with rewards, is not taken, and both ranks name all eight pairs."""
    (first, *_), (second, *_) = errors = groups[2]["ddp/cached/exploding"]["errors"]
    assert first == second
    assert "epoch 0, step 1: rewards of 8 pairs are not finite or beyond preference.max_reward=0.0001" in first
    for step, name in groups[1][SINGLE[0]]["pairs"]:
        assert (f"  {name} (chosen " in first) == (step == 1)
    for _, unchanged, tensors, steps in errors:
        assert unchanged
        assert tensors > 30
        assert steps == 1


def test_sharded_ranks_answer_pictures_and_texts_side_by_side(groups):
    """Two questions on two ranks: one has a picture, the other does not, and both must gather the same weights."""
    ours = groups[2]["fsdp/cached/answers"]
    assert ours["losses"] == pytest.approx(groups[1][SINGLE[0]]["losses"], rel=1e-5)
    assert {"val/exact_match", "val/exact_match/pictures", "val/exact_match/text"} <= ours["validation"].keys()
