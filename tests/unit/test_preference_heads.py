"""Preference heads by hand, their limits, the modes of the running shift, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ivl_lightning.losses.generation import SFT, label_weights
from ivl_lightning.losses.mpo import MPOLoss, PreferenceMixture
from ivl_lightning.losses.pair_head import PairHead, SmoothedHead
from ivl_lightning.losses.preference import (
    AOT,
    IPO,
    AOTPair,
    EXOPair,
    HingePreference,
    RobustPreference,
    SigmoidPreference,
)
from ivl_lightning.losses.quality import BCOPair, NCAPair, SPPOHard
from ivl_lightning.losses.running_shift import SHIFT_UPDATES, RunningShift
from ivl_lightning.reweighting import REDUCTIONS, label_weight
from ivl_lightning.structures import PairScores
from tests.pair_scores import from_log_ratios, from_rewards

HEADS = (
    AOT,
    AOTPair,
    BCOPair,
    EXOPair,
    HingePreference,
    IPO,
    NCAPair,
    RobustPreference,
    SFT,
    SPPOHard,
    SigmoidPreference,
)
WITH_BETA = tuple(head for head in HEADS if head is not SFT)
SMOOTHED = tuple(head for head in HEADS if issubclass(head, SmoothedHead))
LN2, LN3 = math.log(2.0), math.log(3.0)
rewards = st.floats(-5.0, 5.0)


def only(head: nn.Module, pairs: PairScores) -> float:
    """The loss of a single pair."""
    losses = head(pairs)
    assert losses.shape == (1,)
    return losses.item()


# A margin of ln 3 has sigmoid 3/4, and a margin of -ln 3 has 1/4.
@pytest.mark.parametrize(
    ("head", "expected"),
    [
        # -log 3/4.
        (SigmoidPreference(), math.log(4 / 3)),
        # -0.9 log 3/4 - 0.1 log 1/4.
        (SigmoidPreference(label_smoothing=0.1), 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        # (-0.9 log 3/4 + 0.1 log 1/4) / 0.8.
        (RobustPreference(label_smoothing=0.1), (0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8),
        (RobustPreference(), math.log(4 / 3)),
        # Divergence of (3/4, 1/4) from (3/4, 1/4) is 0; from (0.999, 0.001) it is large.
        (EXOPair(label_smoothing=0.25), 0.0),
        (EXOPair(), 0.75 * math.log(0.75 / 0.999) + 0.25 * math.log(0.25 / 0.001)),
        # One pair alone is sorted already.
        (AOT(label_smoothing=0.1), 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        (AOTPair(label_smoothing=0.1), 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        (HingePreference(), 0.0),
    ],
)
def test_relative_heads_by_hand(head, expected):
    """r_c = ln 3 and r_r = 0, so that the margin is ln 3."""
    assert only(head, from_rewards([LN3], [0.0])) == pytest.approx(expected, abs=1e-6)


def test_hinge_by_hand():
    """max(0, 1 - m): 1 - (0.2 - 0.5) = 1.3, and 0 beyond a margin of 1."""
    assert HingePreference()(from_rewards([0.2, 2.0], [0.5, 0.5])).tolist() == pytest.approx([1.3, 0.0])


def test_ipo_averages_over_tokens():
    """a = 6 over 2 tokens, b = -4 over 4: (3 - (-1) - 1 / (2 * 0.1))^2 = (4 - 5)^2; no token divides by nothing."""
    pairs = from_log_ratios([6.0, 0.0], [-4.0, 0.0], chosen_tokens=[2.0, 0.0], rejected_tokens=[4.0, 0.0])
    assert IPO()(pairs).tolist() == pytest.approx([1.0, 25.0])


def test_sppo_by_hand():
    """(a - 5)^2 + (b + 5)^2 at beta 0.1: (6 - 5)^2 + (-3 + 5)^2."""
    assert only(SPPOHard(), from_log_ratios([6.0], [-3.0])) == pytest.approx(5.0, rel=1e-5)


def test_nca_by_hand():
    """r_c = ln 3, r_r = -ln 3: -log 3/4 - log(1/4) / 2 - log(3/4) / 2."""
    expected = 1.5 * math.log(4 / 3) + 0.5 * math.log(4)
    assert only(NCAPair(), from_rewards([LN3], [-LN3])) == pytest.approx(expected, rel=1e-5)


def test_bco_by_hand():
    """r_c = 2 ln 3, r_r = 0: the shift is ln 3, and the loss -log sigmoid(ln 3) twice, with the shift held fixed.

    d loss / d a = -beta (1 - 3/4), as if the shift did not depend on a.
    """
    pairs = from_rewards([2 * LN3], [0.0])
    head = BCOPair()
    loss = head(pairs)
    loss.sum().backward()
    assert head.shift.mean.item() == pytest.approx(LN3, rel=1e-6)
    assert loss.item() == pytest.approx(2 * math.log(4 / 3), rel=1e-5)
    assert pairs.policy_chosen.grad.item() == pytest.approx(-0.1 * 0.25, rel=1e-5)


def test_aot_sorts_within_the_micro_batch():
    """Rewards chosen (1, 0), rejected (0, 3).

    Paired: sorted (0, 1) against (0, 3), margins 0 and -2. Unpaired: policy gaps (1, -3) against reference gaps (0, 0),
    margins -3 and 1.
    """
    pairs = from_rewards([1.0, 0.0], [0.0, 3.0])
    assert AOTPair()(pairs).tolist() == pytest.approx([LN2, math.log1p(math.exp(2.0))], rel=1e-5)
    assert AOT()(pairs).tolist() == pytest.approx([math.log1p(math.exp(3.0)), math.log1p(math.exp(-1.0))], rel=1e-5)


@pytest.mark.parametrize(("reduction", "expected"), [("token", [8.0, 0.0]), ("sample", [2.0, 0.0]), ("square", [4, 0])])
def test_sft_by_hand(reduction, expected):
    """NLL 8 over 4 tokens, each weighing 1, 1/4 or 1/2; a response without a token weighs nothing."""
    pairs = from_log_ratios([0.0, 0.0], [0.0, 0.0], chosen_tokens=[4.0, 0.0])
    pairs = replace(pairs, policy_chosen=torch.tensor([-8.0, 0.0]))
    assert SFT(reduction)(pairs).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_label_weights_are_those_of_the_next_token_loss(reduction):
    numbers = [0, 1, 2, 3, 10, 5000]
    wanted = [label_weight(number, reduction) for number in numbers]
    assert label_weights(torch.tensor(numbers).float(), reduction).tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("head", [SigmoidPreference, RobustPreference, HingePreference, NCAPair, BCOPair, AOT, AOTPair])
def test_where_policy_is_reference(head):
    """Rewards of 0: one log sigmoid(0) = -ln 2 for each term; hinge 1."""
    terms = {NCAPair: 2 * LN2, BCOPair: 2 * LN2, HingePreference: 1.0}
    assert only(head(), from_rewards([0.0], [0.0])) == pytest.approx(terms.get(head, LN2), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(chosen=rewards, rejected=rewards, share=st.floats(0.0, 0.4))
def test_smoothing_is_the_mean_over_swapped_labels(chosen, rejected, share):
    """cDPO is (1 - e) L(c, r) + e L(r, c) of DPO; the robust loss, averaged likewise, is DPO again: unbiased."""
    pair, swapped = from_rewards([chosen], [rejected]), from_rewards([rejected], [chosen])
    plain, smoothed, robust = SigmoidPreference(), SigmoidPreference(0.1, share), RobustPreference(0.1, share)
    mixed = (1 - share) * only(plain, pair) + share * only(plain, swapped)
    assert only(smoothed, pair) == pytest.approx(mixed, abs=1e-4)
    assert (1 - share) * only(robust, pair) + share * only(robust, swapped) == pytest.approx(
        only(plain, pair), abs=1e-4
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(rewards, rewards), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_sorting_forgets_the_order(pairs, random):
    """AOT of shuffled chosen against shuffled rejected answers is the same."""
    chosen, rejected = (list(column) for column in zip(*pairs, strict=True))
    before = AOTPair()(from_rewards(chosen, rejected))
    random.shuffle(chosen)
    torch.testing.assert_close(AOTPair()(from_rewards(chosen, rejected)), before)


@pytest.mark.parametrize("head", HEADS)
def test_no_pair(head):
    """An empty micro-batch gives no loss, and a gradient of 0 rather than none."""
    pairs = from_log_ratios([], [])
    module = head()
    losses = module(pairs)
    losses.sum().backward()
    module.end_step()
    assert losses.shape == pairs.policy_chosen.grad.shape == (0,)


@pytest.mark.parametrize("update", SHIFT_UPDATES)
def test_no_pair_in_a_mixture(update):
    """0 / 0 is 0, in the mixture and in the published loss; the shift does not move, and the graph is whole."""
    pairs = from_log_ratios([], [])
    parts = {"bco": {"weight": 1.0, "head": BCOPair(update=update)}, "sft": {"weight": 1.0, "head": SFT()}}
    mixture, published = PreferenceMixture(parts), MPOLoss(update=update)
    logps = [pairs.policy_chosen, pairs.policy_rejected, pairs.reference_chosen, pairs.reference_rejected]
    loss = mixture(pairs).loss + published(*logps, -pairs.policy_chosen).loss
    loss.backward()
    for module in (mixture, published):
        module.end_step()
    assert loss.item() == 0.0
    assert mixture.shift.item() == published.quality.shift.count.item() == 0.0


def feed(shift: RunningShift, *micro_batches: list[tuple[float, float]]) -> list[float]:
    """The shift used for each micro-batch, read when all are through: later ones must not change it."""
    used = [shift(torch.tensor(rewards, dtype=torch.float64)) for rewards in micro_batches]
    return [value.item() for value in used]


ONE, TWO = [(1.0, 0.0)], [(3.0, 1.0), (5.0, 3.0)]


@pytest.mark.parametrize(
    ("update", "used", "count"),
    [
        # Means of the micro-batches 0.5 and 3: 0.5, (0.5 + 3) / 2.
        ("micro_batch", [0.5, 1.75], 2),
        # Means of the pairs 0.5, 2 and 4: 0.5, 6.5 / 3.
        ("pair", [0.5, 6.5 / 3], 3),
        # Nothing before the first step is done.
        ("step", [0.0, 0.0], 0),
    ],
)
def test_what_counts_once(update, used, count):
    shift = RunningShift(update)
    assert feed(shift, ONE, TWO) == pytest.approx(used)
    assert shift.count.item() == count


def test_a_step_uses_the_shift_of_the_step_before():
    """Pairs 0.5, 2 and 4 in the first step, 0.5 in the second: 0, then 6.5 / 3, then 7 / 4."""
    shift = RunningShift("step")
    assert feed(shift, ONE, TWO) == [0.0, 0.0]
    shift.end_step()
    assert feed(shift, ONE) == pytest.approx([6.5 / 3])
    shift.end_step()
    shift.end_step()
    assert (shift.mean.item(), shift.count.item()) == (pytest.approx(7 / 4), 4.0)


@pytest.mark.parametrize("update", ["micro_batch", "pair"])
def test_end_step_is_for_step_only(update):
    shift = RunningShift(update)
    feed(shift, ONE)
    shift.end_step()
    assert (shift.mean.item(), shift.count.item()) == (0.5, 1.0)


@pytest.mark.parametrize("update", SHIFT_UPDATES)
def test_evaluation_changes_nothing(update):
    shift = RunningShift(update)
    feed(shift, ONE)
    shift.end_step()
    shift.eval()
    assert feed(shift, TWO, TWO) == [0.5, 0.5]
    shift.end_step()
    assert (shift.mean.item(), shift.count.item()) == (0.5, 1.0)


def test_backward_may_come_after_several_forwards():
    """The second micro-batch moves the mean in place; d loss / d a of the first still has its own shift, 0.5."""
    head = BCOPair()
    first, second = from_rewards([1.0], [0.0]), from_rewards([3.0], [1.0])
    (head(first) + head(second)).sum().backward()
    assert first.policy_chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.5)), rel=1e-5)


def test_a_cast_keeps_the_shift():
    """1/3 has no bfloat16: the mean stays float64 and exact, while rewards get a shift of their own dtype."""
    loss = MPOLoss()
    loss.quality.shift.mean.fill_(1 / 3)
    loss.to(torch.bfloat16).half()
    shift = loss.quality.shift.eval()
    assert shift.mean.dtype == shift.count.dtype == shift.pending.dtype == torch.float64
    assert shift.mean.item() == 1 / 3
    assert shift(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_shift_is_saved_and_the_unfinished_step_is_not():
    mixture = PreferenceMixture({"quality": {"weight": 1.0, "head": BCOPair(update="step")}})
    assert set(mixture.state_dict()) == {"heads.quality.shift.mean", "heads.quality.shift.count"}
    mixture(from_rewards([1.0], [0.0]))
    assert mixture.shift.item() == 0.0
    mixture.end_step()
    assert mixture.shift.item() == pytest.approx(0.5)


def test_a_mixture_without_bco_or_sft():
    mixture = PreferenceMixture({"preference": {"weight": 2, "head": HingePreference()}})
    assert mixture.shift is None
    assert mixture.reduction == "sample"
    output = mixture(from_rewards([0.0, 0.0], [0.0, 1.0]))
    assert (output.loss.item(), output.parts["preference"].item()) == pytest.approx((3.0, 1.5))


class Constant(PairHead):
    """A head of somebody else's."""

    def forward(self, pairs: PairScores) -> Tensor:
        return torch.ones_like(pairs.policy_chosen)


def test_other_heads_can_be_mixed_in():
    mixture = PreferenceMixture({"theirs": {"weight": 0.5, "head": Constant()}})
    assert mixture(from_rewards([1.0, 2.0], [0.0, 0.0])).loss.item() == 0.5
    mixture.end_step()
    with pytest.raises(NotImplementedError):
        PairHead()(from_rewards([1.0], [0.0]))


@pytest.mark.parametrize("head", WITH_BETA)
@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_beta_is_checked(head, beta):
    with pytest.raises(ValueError, match=r"beta=.* must be a number above 0"):
        head(beta=beta)


@pytest.mark.parametrize("head", SMOOTHED)
@pytest.mark.parametrize("share", [-0.1, 0.5, math.nan])
def test_label_smoothing_is_checked(head, share):
    with pytest.raises(ValueError, match=r"label_smoothing=.* must be at least 0 and below 0\.5"):
        head(label_smoothing=share)


def test_names_are_checked():
    with pytest.raises(ValueError, match=r"update='epoch' is not known: use one of micro_batch, pair, step"):
        BCOPair(update="epoch")
    with pytest.raises(ValueError, match=r"loss\.reduction='mean' is not known"):
        SFT("mean")


GOOD = {"weight": 1.0, "head": SFT()}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "parts is empty"),
        ({"keys": GOOD}, r"parts\.keys cannot be a part's name"),
        ({"a.b": GOOD}, r"parts\.a\.b cannot be a part's name"),
        ({"sft": {"weight": math.nan, "head": SFT()}}, r"parts\.sft\.weight=nan must be a finite number"),
        ({"sft": {"weight": "1", "head": SFT()}}, r"parts\.sft\.weight='1' must be a finite number"),
        ({"sft": {"head": SFT()}}, r"parts\.sft must hold weight and head, and holds head"),
        ({"sft": {"weight": 1.0, "head": nn.Identity()}}, r"parts\.sft\.head=Identity\(\) is not a PairHead"),
        ({"a": {"weight": 1.0, "head": SFT("token")}, "b": GOOD}, r"different reductions \(sample, token\)"),
    ],
)
def test_wrong_parts_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        PreferenceMixture(parts)


def test_published_weights_are_checked():
    with pytest.raises(ValueError, match="quality_weight=inf must be a finite number"):
        MPOLoss(quality_weight=math.inf)
