"""Mixture, packs and plan: nothing lost or doubled, caps never broken, the same plan on any layout."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_lightning.data.mixture import epoch_order, epoch_size
from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.data.plan import PlanSettings, TrainingPlan, accumulation, fixed_plan
from ivl_lightning.reweighting import sample_weight

SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 8)), min_size=1, max_size=120)


def test_repeat_times_by_hand():
    """Sizes 5, 4, 3 with repeat 0.6, 1, 2.5: int(3.0) + 4 + int(7.5) = 14 samples; rows 9..11 twice, one thrice."""
    assert epoch_size([5, 4, 3], [0.6, 1, 2.5]) == 14
    order = epoch_order([5, 4, 3], [0.6, 1, 2.5], seed=0, epoch=0)
    rows = Counter((order % 12).tolist())
    assert len(order) == len(set(order.tolist())) == 14
    assert sum(rows[row] for row in range(5)) == 3
    assert all(rows[row] == 1 for row in range(5, 9))
    assert sorted(rows[row] for row in range(9, 12)) == [2, 2, 3]


def test_a_fraction_is_new_in_each_epoch_or_the_head():
    """`random`: other rows in other epochs, the same in the same; `prefix`: the first int(n * r) of the file."""
    draws = {tuple(sorted(epoch_order([40], [0.5], seed=1, epoch=epoch))) for epoch in range(5)}
    assert len(draws) == 5
    assert np.array_equal(epoch_order([40], [0.5], seed=1, epoch=3), epoch_order([40], [0.5], seed=1, epoch=3))
    assert sorted(epoch_order([40], [0.5], seed=1, epoch=3, rule="prefix")) == list(range(20))


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 64), st.integers(1, 5), st.integers(0, 3))
def test_packs_lose_nothing_and_break_no_cap(samples, pool_size, world_size, seed):
    tokens, tiles = zip(*samples, strict=True)
    packs = list(PackPlanner(100, 8, pool_size, world_size, seed).plan(tokens, tiles))
    assert sorted(sample for pack in packs for sample in pack.samples) == list(range(len(samples)))
    for pack in packs:
        assert pack.samples
        assert pack.tokens == sum(tokens[s] for s in pack.samples) <= 100
        assert pack.tiles == sum(tiles[s] for s in pack.samples) <= 8


@settings(deadline=None, max_examples=40)
@given(SAMPLES, st.integers(1, 16), st.integers(1, 4), st.integers(0, 40))
def test_planner_continues_at_every_cut(samples, pool_size, world_size, cut):
    """State after k packs, loaded into a fresh planner, gives the packs k, k+1, ... of the uncut run."""
    tokens, tiles = zip(*samples, strict=True)
    whole = list(PackPlanner(100, 8, pool_size, world_size).plan(tokens, tiles))
    first = PackPlanner(100, 8, pool_size, world_size)
    stream = first.plan(tokens, tiles)
    head = list(islice(stream, cut))
    second = PackPlanner(100, 8, pool_size, world_size, seed=99)
    second.load_state_dict(first.state_dict())
    assert head + list(second.plan(tokens, tiles)) == whole


def test_the_oldest_sample_is_in_the_next_pack():
    """A sample that fits nowhere (99 of 100 tokens) among many small ones is not overtaken for ever."""
    tokens = [50, 99] + [1] * 200
    packs = list(PackPlanner(100, 0, pool_size=10).plan(tokens, [0] * len(tokens)))
    assert 0 in packs[0].samples
    assert 1 in packs[1].samples


def test_groups_have_like_cost():
    """Packs of 1 token and of 100 alternate on arrival; in groups of two like stands with like."""
    tokens = [1, 100] * 16
    planner = PackPlanner(100, 0, pool_size=1, world_size=2)
    packs = [pack.tokens for pack in planner.plan(tokens, [0] * 32)]
    assert all(packs[i] == packs[i + 1] for i in range(0, 32, 2))
    assert packs != sorted(packs), "groups are shuffled"


def test_a_sample_over_a_cap_is_named():
    with pytest.raises(ValueError, match="sample 1 has 11 tokens and 0 tiles, a pack holds 10 and 4"):
        list(PackPlanner(10, 4).plan([3, 11], [0, 0]))


def make_plan(packs_per_step=4, reduction="square", **changes):
    rng = np.random.default_rng(0)
    tokens, labels, tiles = rng.integers(1, 60, 100), rng.integers(1, 9, 100), rng.integers(0, 4, 100)
    options = {"max_tokens": 100, "max_tiles": 8, "pool_size": 16, "seed": 3, **changes}
    plan_settings = PlanSettings(packs_per_step=packs_per_step, reduction=reduction, **options)
    return TrainingPlan(tokens, labels, tiles, sizes=[60, 40], repeats=[1, 1.5], settings=plan_settings)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_layout_deals_the_same_step(world_size):
    """The union over ranks and micro-steps of a step = its packs; W is the same everywhere."""
    plan = make_plan()
    epoch = plan.epoch(1)
    dealt = [list(plan.deal(epoch, rank, world_size)) for rank in range(world_size)]
    for number, step in enumerate(epoch.steps):
        mine = [planned for packs in dealt for planned in packs if planned.step == number]
        assert Counter(planned.pack for planned in mine) == Counter(step.packs)
        assert {planned.weight_sum for planned in mine} == {step.weight_sum}
        assert {planned.num_micro_steps for planned in mine} == {4 // world_size}


def test_the_normaliser_is_the_sum_of_sample_weights():
    """W of a step = sum over its samples of sqrt(labels), for square."""
    plan = make_plan()
    for step in plan.epoch(0).steps:
        rows = [sample % 100 for pack in step.packs for sample in pack.samples]
        assert step.weight_sum == pytest.approx(sum(float(plan.labels[row]) ** 0.5 for row in rows))


def test_an_epoch_uses_every_sample_once():
    plan = make_plan()
    samples = [s for step in plan.epoch(2).steps for pack in step.packs for s in pack.samples]
    assert len(samples) == len(set(samples)) == plan.samples_per_epoch == 120
    assert all(len(step.packs) == 4 for step in plan.epoch(2).steps), "the last step is filled with empty packs"


def test_starting_in_the_middle_gives_the_rest():
    plan = make_plan()
    epoch = plan.epoch(0)
    whole = list(plan.deal(epoch, 1, 2))
    assert list(plan.deal(epoch, 1, 2, start_step=3)) == [planned for planned in whole if planned.step >= 3]


def test_progress_reaches_one_with_the_last_step_of_the_run():
    plan = make_plan(epochs=2)
    assert list(plan.deal(plan.epoch(0), 0, 1))[-1].progress == pytest.approx(0.5)
    assert list(plan.deal(plan.epoch(1), 0, 1))[-1].progress == 1.0


def test_ranks_must_divide_a_step():
    assert accumulation(8, 2) == 4
    with pytest.raises(ValueError, match="packs_per_step=6 cannot be dealt to 4"):
        accumulation(6, 4)


def test_a_step_without_a_label_is_refused():
    options = PlanSettings(packs_per_step=1, max_tokens=9, max_tiles=1, pool_size=4, seed=0, reduction="token")
    ones = np.ones(3, dtype=np.int64)
    plan = TrainingPlan(ones, ones * 0, ones * 0, sizes=[3], repeats=[1], settings=options)
    with pytest.raises(ValueError, match="no label to train on"):
        plan.epoch(0)
    with pytest.raises(ValueError, match="no row to train on"):
        TrainingPlan(ones, ones, ones, sizes=[3], repeats=[0.1], settings=options)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_packs_are_the_same_on_any_layout(world_size):
    tokens, labels, tiles = [40] * 11, [4] * 11, [1] * 11
    shares = [
        fixed_plan(
            tokens, labels, tiles, max_tokens=100, max_tiles=8, reduction="square", rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    packs = sorted(planned.pack.samples for share in shares for planned in share if planned.pack.samples)
    assert packs == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10,)]
    assert shares[0][0].weight_sum == pytest.approx(11 * sample_weight(4, "square"))
