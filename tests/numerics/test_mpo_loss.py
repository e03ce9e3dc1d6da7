"""MPO: the original's numbers over three micro-batches, worked examples, and the published mixture."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ivl_lightning.losses.generation import SFT
from ivl_lightning.losses.mpo import MPOLoss, PreferenceMixture
from ivl_lightning.losses.preference import SigmoidPreference
from ivl_lightning.losses.quality import BCOPair
from ivl_lightning.losses.rewards import implicit_rewards
from ivl_lightning.structures import LossOutput, PairScores
from tests.pair_scores import from_log_ratios, from_rewards

FIXTURES = Path(__file__).parents[1] / "fixtures/mpo"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())["opengvlab"]
TOLERANCE = 1e-6

# (r_c, r_r), shift, sigmoid, BCO, and 0.8 sigmoid + 0.2 BCO of one pair in each micro-batch on one rank.
WORKED = [
    ((1.0, 0.2), 0.600000, 0.371101, 1.026031, 0.502087),
    ((0.4, -0.6), 0.250000, 0.313262, 0.976822, 0.445974),
    ((2.0, 1.0), 0.666667, 0.313262, 1.107601, 0.472130),
]


class Golden(NamedTuple):
    """A micro-batch of the fixture."""

    policy_logits: Tensor
    pairs: PairScores

    @property
    def nll(self) -> Tensor:
        """Mean over the chosen tokens of all pairs, as the original's."""
        return -self.pairs.policy_chosen.sum() / self.pairs.chosen_tokens.sum()

    def run(self, loss: MPOLoss) -> LossOutput:
        pairs = self.pairs
        scores = (pairs.policy_chosen, pairs.policy_rejected, pairs.reference_chosen, pairs.reference_rejected)
        return loss(*scores, self.nll)


def golden_batch(number: int) -> Golden:
    """Log-probabilities are summed over the completion; position t - 1 predicts token t."""
    with np.load(FIXTURES / "inputs.npz") as arrays:
        names = ("input_ids", "completion_mask", "policy_logits", "ref_logits")
        ids, mask, policy_logits, reference_logits = (torch.from_numpy(arrays[f"step{number}_{n}"]) for n in names)
    policy_logits.requires_grad_()
    sums = []
    for logits in (policy_logits, reference_logits):
        logps = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
        sums += (logps * mask[:, 1:]).sum(dim=1).split(4)
    return Golden(policy_logits, PairScores(*sums, *mask[:, 1:].sum(dim=1).float().split(4)))


def test_equals_the_original():
    """Total loss, shift and gradient by the policy's logits of three micro-batches, in order."""
    loss = MPOLoss()
    for number, expected in enumerate(EXPECTED):
        batch = golden_batch(number)
        output = batch.run(loss)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(expected["loss"], abs=TOLERANCE)
        assert output.parts["generation"].item() == pytest.approx(expected["nll"], abs=TOLERANCE)
        assert loss.quality.shift.mean.item() == pytest.approx(expected["running_mean"], abs=TOLERANCE)
        assert loss.quality.shift.count.item() == expected["running_count"]
        norm = batch.policy_logits.grad.norm().item()
        assert norm == pytest.approx(expected["grad_policy_logits_norm"], abs=TOLERANCE)


def test_heads_equal_the_original_for_each_pair():
    """sigmoid and bco_pair of each pair, and the logged rewards."""
    preference, quality = SigmoidPreference(), BCOPair()
    for number, expected in enumerate(EXPECTED):
        pairs = golden_batch(number).pairs
        assert preference(pairs).tolist() == pytest.approx(expected["sigmoid"], abs=TOLERANCE)
        assert quality(pairs).tolist() == pytest.approx(expected["bco_pair"], abs=TOLERANCE)
        earned = implicit_rewards(pairs, beta=0.1)
        assert not earned.requires_grad
        chosen, rejected = earned.unbind(dim=1)
        metrics = expected["metrics"]
        assert chosen.mean().item() == pytest.approx(metrics["rewards/chosen"], abs=TOLERANCE)
        assert rejected.mean().item() == pytest.approx(metrics["rewards/rejected"], abs=TOLERANCE)
        assert (chosen - rejected).mean().item() == pytest.approx(metrics["rewards/margins"], abs=TOLERANCE)
        assert (chosen > rejected).float().mean().item() == metrics["rewards/accuracies"]


def test_the_mixture_equals_the_original():
    """The same as `PreferenceMixture`, with the token mean as the generation part."""
    heads = {"preference": (0.8, SigmoidPreference()), "quality": (0.2, BCOPair()), "generation": (1.0, SFT("token"))}
    mixture = PreferenceMixture({name: {"weight": weight, "head": head} for name, (weight, head) in heads.items()})
    for number, expected in enumerate(EXPECTED):
        assert mixture(golden_batch(number).pairs).loss.item() == pytest.approx(expected["loss"], abs=TOLERANCE)
        assert mixture.shift.item() == pytest.approx(expected["running_mean"], abs=TOLERANCE)


def test_the_state_dict_goes_on():
    """A module that loads the state behind micro-batch 0 gives the losses of the one that went through it."""
    first, second = MPOLoss(), MPOLoss()
    golden_batch(0).run(first)
    second.load_state_dict(first.state_dict())
    for number in (1, 2):
        loss = golden_batch(number).run(second).loss
        assert loss.item() == pytest.approx(EXPECTED[number]["loss"], abs=TOLERANCE)
    assert golden_batch(1).run(MPOLoss()).loss.item() != pytest.approx(EXPECTED[1]["loss"], abs=1e-4)


def test_worked_table_on_one_rank():
    """d is the mean of all rewards so far: 0.6; (0.6 - 0.1) / 2 = 0.25; (0.6 - 0.1 + 1.5) / 3 = 2/3."""
    loss = MPOLoss(generation_weight=0.0)
    for rewards, shift, sigmoid, bco, mixed in WORKED:
        pairs = from_rewards(*([reward] for reward in rewards))
        output = Golden(torch.empty(0), pairs).run(loss)
        assert loss.quality.shift.mean.item() == pytest.approx(shift, abs=TOLERANCE)
        assert output.parts["preference"].item() == pytest.approx(sigmoid, abs=TOLERANCE)
        assert output.parts["quality"].item() == pytest.approx(bco, abs=TOLERANCE)
        assert output.loss.item() == pytest.approx(mixed, abs=TOLERANCE)


@pytest.mark.parametrize("nll", [torch.tensor([1.5, 0.5]), torch.tensor(1.0)])
def test_where_policy_is_reference(nll):
    """All rewards and the shift are 0: 0.8 ln 2 + 0.2 * 2 ln 2 + NLL."""
    logps = torch.tensor([-3.0, -8.0])
    output = MPOLoss()(logps, logps, logps, logps, nll)
    assert output.loss.item() == pytest.approx(0.8 * math.log(2) + 0.4 * math.log(2) + 1.0, abs=TOLERANCE)
    assert set(output.parts) == {"preference", "quality", "generation"}


def test_generation_is_the_mean_over_responses():
    """Chosen NLL sums 4 over 2 tokens and 3 over 6: (2 + 0.5) / 2 by response, (4 + 3) / 8 by token."""
    pairs = from_log_ratios([0.0, 0.0], [0.0, 0.0], chosen_tokens=[2.0, 6.0])
    pairs = replace(pairs, policy_chosen=torch.tensor([-4.0, -3.0]))
    parts = {rule: PreferenceMixture({"sft": {"weight": 1.0, "head": SFT(rule)}}) for rule in ("sample", "token")}
    assert parts["sample"](pairs).loss.item() == pytest.approx(1.25)
    assert parts["token"](pairs).loss.item() == pytest.approx(0.875)


def test_planned_divisors_add_micro_batches_up():
    """Sums over two micro-batches divided by the step's own counts equal one micro-batch of all pairs."""
    parts = {"dpo": {"weight": 0.8, "head": SigmoidPreference()}, "sft": {"weight": 1.0, "head": SFT()}}
    mixture = PreferenceMixture(parts)
    chosen, rejected, tokens = [1.0, 2.0, -3.0], [0.0, 4.0, 1.0], [2.0, 5.0, 3.0]
    whole = mixture(from_log_ratios(chosen, rejected, chosen_tokens=tokens)).loss
    summed = 0.0
    for part in (slice(0, 1), slice(1, 3)):
        pairs = from_log_ratios(chosen[part], rejected[part], chosen_tokens=tokens[part])
        summed += mixture.combine(mixture.terms(pairs), pairs=3.0, labels=3.0).loss
    assert summed.item() == pytest.approx(whole.item(), rel=1e-6)
