"""Mixture and plan: nothing lost or doubled, the same plan on any layout, continuation equal at every cut."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_lightning.data.horizon import Horizon, horizon, write_steps
from ivl_lightning.data.mixture import Share, epoch_order, epoch_size, shares
from ivl_lightning.data.plan import (
    PlanRows,
    PlanSettings,
    TrainingPlan,
    accumulation,
    draw_frames,
    fixed_plan,
    idle_share,
)
from ivl_lightning.reweighting import sample_weight


def of_sizes(sizes, repeats, **options):
    return shares([f"set{number}" for number in range(len(sizes))], sizes, repeats, **options)


def test_repeat_times_by_hand():
    """Sizes 5, 4, 3 with repeat 0.6, 1, 2.5: int(3.0) + 4 + int(7.5) = 14 samples; rows 9..11 twice, one thrice."""
    mixture = of_sizes([5, 4, 3], [0.6, 1, 2.5])
    assert [share.samples for share in mixture] == [3, 4, 7]
    assert epoch_size(mixture) == 14
    order = epoch_order(mixture, seed=0, epoch=0)
    rows = Counter((order % 12).tolist())
    assert len(order) == len(set(order.tolist())) == 14
    assert sum(rows[row] for row in range(5)) == 3
    assert all(rows[row] == 1 for row in range(5, 9))
    assert sorted(rows[row] for row in range(9, 12)) == [2, 2, 3]


HALF = of_sizes([40], [0.5])


def test_a_fraction_is_new_in_each_epoch_or_the_head():
    """`random`: other rows in other epochs, the same in the same; `prefix`: the first int(n * r) of the file."""
    draws = {tuple(sorted(epoch_order(HALF, seed=1, epoch=epoch))) for epoch in range(5)}
    assert len(draws) == 5
    assert np.array_equal(epoch_order(HALF, seed=1, epoch=3), epoch_order(HALF, seed=1, epoch=3))
    assert sorted(epoch_order(HALF, seed=1, epoch=3, rule="prefix")) == list(range(20))


def make_rows(count=100, videos=True):
    rng = np.random.default_rng(0)
    most = np.where(rng.random(count) < 0.3, rng.integers(1, 5, count), 0).astype(np.int16) * videos
    fewest = np.minimum(most, 1 + rng.integers(0, 2, count)).astype(np.int16)
    return PlanRows(
        tokens=(rng.integers(20, 60, count) + 6 * most).astype(np.int32),
        labels=rng.integers(1, 9, count).astype(np.int32),
        tiles=(most + (most == 0) * rng.integers(0, 4, count)).astype(np.int32),
        most_frames=most,
        fewest_frames=fewest,
        frame_tokens=np.array([0, 0, 5, 10, 15, 21]),
    )


def make_plan(packs_per_step=4, reduction="square", rows=None, **changes):
    options = {"max_tokens": 100, "max_tiles": 8, "pool_size": 16, "seed": 3, "max_frames": 5, **changes}
    plan_settings = PlanSettings(packs_per_step=packs_per_step, reduction=reduction, **options)
    return TrainingPlan(rows or make_rows(), of_sizes([60, 40], [1, 1.5]), plan_settings)


def deal(plan, epoch, rank, world_size):
    return list(plan.deal(plan.epoch(epoch), rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_layout_deals_the_same_step(world_size):
    """The union over ranks and micro-steps of a step = its packs; W is the same everywhere."""
    plan = make_plan()
    dealt = [deal(plan, 1, rank, world_size) for rank in range(world_size)]
    for step in plan.epoch(1):
        mine = [planned for packs in dealt for planned in packs if planned.step == step.number]
        assert Counter(planned.pack for planned in mine) == Counter(step.packs)
        assert {planned.weight_sum for planned in mine} == {step.weight_sum}
        assert {planned.num_micro_steps for planned in mine} == {4 // world_size}


def test_the_normaliser_is_the_sum_of_sample_weights():
    """W of a step = sum over its samples of sqrt(labels), for square."""
    plan = make_plan()
    for step in plan.epoch(0):
        rows = [sample % 100 for pack in step.packs for sample in pack.samples]
        assert step.weight_sum == pytest.approx(sum(float(plan.rows.labels[row]) ** 0.5 for row in rows))


def test_an_epoch_uses_every_sample_once():
    plan = make_plan()
    steps = list(plan.epoch(2))
    samples = [s for step in steps for pack in step.packs for s in pack.samples]
    assert len(samples) == len(set(samples)) == plan.samples_per_epoch == steps[-1].consumed == 120
    assert all(len(step.packs) == 4 for step in steps), "the last step is filled with empty packs"


def test_frames_are_drawn_and_counted():
    """Each pack's tokens and tiles are those of the frames it names, and no draw leaves its row's range."""
    plan, drawn = make_plan(), Counter()
    for epoch in range(6):
        for step in plan.epoch(epoch):
            for pack in step.packs:
                rows = [sample % 100 for sample in pack.samples]
                frames = pack.frames or (0,) * len(rows)
                tokens = sum(plan.rows.planned_tokens(row, count) for row, count in zip(rows, frames, strict=True))
                most = plan.rows.most_frames[rows]
                assert pack.tokens == tokens <= 100
                assert pack.tiles == int(plan.rows.tiles[rows].sum() - (most - frames).sum()) <= 8
                assert ((plan.rows.fewest_frames[rows] <= frames) & (frames <= most)).all()
                drawn.update(frames)
    assert set(drawn) == {0, 1, 2, 3, 4}


def test_a_draw_depends_on_the_sample_alone():
    """Sample 5 gets the same frames whatever stands beside it.

    8 to 11 come up a quarter of the time each; a video of 9 frames takes 9 where 9, 10 or 11 come up; a fixed number
    stays, and what is no video has none.
    """
    full = [np.full(20_000, value, np.int16) for value in (8, 11, 9, 0)]

    def draw(numbers, low, high, epoch=2):
        return draw_frames(numbers, full[low][: len(numbers)], full[high][: len(numbers)], 11, seed=1, epoch=epoch)

    frames = draw(np.arange(20_000), 0, 1)
    assert draw(np.array([5]), 0, 1)[0] == frames[5]
    assert np.allclose(np.bincount(frames, minlength=12)[8:] / 20_000, 0.25, atol=0.02)
    assert not np.array_equal(frames, draw(np.arange(20_000), 0, 1, epoch=3))
    assert np.allclose(np.bincount(draw(np.arange(20_000), 0, 2))[8:] / 20_000, [0.25, 0.75], atol=0.02)
    assert set(draw(np.arange(100), 2, 2)) == {9}
    assert set(draw(np.arange(100), 3, 3)) == {0}


def test_the_expected_frames_are_the_mean_of_the_draws():
    """Two videos, [2, 4] of at most 5: drawn 2..5, capped at 4: mean (2 + 3 + 4 + 4) / 4 = 3.25, so 0.75 are spared."""
    two = np.array([2, 2], np.int16)
    rows = PlanRows(two, two, 2 * two, 2 * two, two, np.arange(6))
    plan = TrainingPlan(rows, of_sizes([2], [1]), PlanSettings(1, 100, 1, 4, 0, "token", max_frames=5))
    assert plan.fewest_steps() == pytest.approx(2 * 3.25)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 8)), min_size=2, max_size=120),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(0, 3),
    st.data(),
)
def test_continuation_is_equal_at_every_cut(samples, packs_per_step, pool_size, epoch, data):
    """The steps behind the state of step k = the steps k+1, k+2, ... of the uncut plan, states included."""
    tokens, tiles = (np.array(column, dtype=np.int32) for column in zip(*samples, strict=True))
    zeros = np.zeros(len(samples), dtype=np.int16)
    rows = PlanRows(tokens, np.ones_like(tokens), tiles, zeros, zeros, np.empty(0, dtype=np.int64))
    options = PlanSettings(packs_per_step, 100, 8, pool_size, seed=1, reduction="square")
    whole = list(TrainingPlan(rows, of_sizes([len(samples)], [1.5]), options).epoch(epoch))
    cut = data.draw(st.integers(0, len(whole) - 1))
    state = json.loads(json.dumps(whole[cut].state))
    assert list(TrainingPlan(rows, of_sizes([len(samples)], [1.5]), options).epoch(epoch, state)) == whole[cut + 1 :]


def test_a_state_is_a_few_kilobytes():
    rng = np.random.default_rng(0)
    size = 5000
    zeros = np.zeros(size, dtype=np.int16)
    tokens = rng.integers(50, 9000, size).astype(np.int32)
    rows = PlanRows(tokens, tokens, rng.integers(0, 30, size).astype(np.int32), zeros, zeros, np.empty(0, np.int64))
    plan = TrainingPlan(rows, of_sizes([size], [1]), PlanSettings(8, 16384, 48, 512, 0, "square"))
    assert max(len(pickle.dumps(step.state)) for step in plan.epoch(0)) < 16_384


def test_progress_reaches_one_with_the_last_step_of_the_run():
    plan = make_plan(epochs=2)
    assert deal(plan, 0, 0, 1)[-1].progress == pytest.approx(0.5)
    assert deal(plan, 1, 0, 1)[-1].progress == 1.0


def test_idle_share_by_hand():
    """Two ranks: (2, 4) then (5, 5): they take 4 and 5, so 18 are paid and 16 worked. One rank never waits."""
    assert idle_share([2, 4, 5, 5], 2) == pytest.approx(1 - 16 / 18)
    assert idle_share([2, 4, 5, 5], 1) == 0.0
    assert idle_share([0.0, 0.0], 2) == 0.0


def test_ranks_must_divide_a_step():
    assert accumulation(8, 2) == 4
    with pytest.raises(ValueError, match="packs_per_step=6 cannot be dealt to 4"):
        accumulation(6, 4)


def ones_plan(labels, repeats):
    ones, zeros = np.ones(3, dtype=np.int32), np.zeros(3, dtype=np.int16)
    options = PlanSettings(packs_per_step=1, max_tokens=9, max_tiles=1, pool_size=4, seed=0, reduction="token")
    rows = PlanRows(ones, labels * ones, 0 * ones, zeros, zeros, np.empty(0, dtype=np.int64))
    return TrainingPlan(rows, of_sizes([3], repeats), options)


def test_a_step_without_a_label_is_refused():
    with pytest.raises(ValueError, match="no label to train on"):
        list(ones_plan(0, [1]).epoch(0))
    with pytest.raises(ValueError, match="no row to train on"):
        ones_plan(1, [0.1])


def test_weights_part_the_epoch():
    """100 + 300 samples at 3 : 1 are 300 of the first (each row three times) and 100 of the other (a third of it)."""
    mixture = of_sizes([100, 300], [1, 1], weights={"set0": 3, "set1": 1})
    assert [share.samples for share in mixture] == [300, 100]
    rows = Counter((epoch_order(mixture, seed=0, epoch=0) % 400).tolist())
    assert all(rows[row] == 3 for row in range(100))
    assert sum(rows[row] for row in range(100, 400)) == 100
    assert [share.samples for share in of_sizes([1, 1, 1], [1, 1, 1], weights={"set0": 1, "set1": 1, "set2": 0})] == [
        2,
        1,
        0,
    ]


def test_sqrt_resampling():
    """sqrt(100) : sqrt(900) = 1 : 3 of 1000 samples."""
    assert [share.samples for share in of_sizes([100, 900], [1, 1], resampling="sqrt")] == [250, 750]
    assert [share.samples for share in of_sizes([50, 900], [2, 1], resampling="sqrt")] == [250, 750]


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"set0": 1}, r"without a weight are \['set1'\]"), ({"set0": 1, "set1": -1}, "none may be negative")],
)
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        of_sizes([3, 3], [1, 1], weights=weights)


def test_the_horizon_is_known_at_the_start(tmp_path):
    """`max_steps`; else an earlier pass; else the lower bound: 100 rows, packs of 100 tokens, 4 packs a step."""
    plan = make_plan(rows=make_rows(videos=False))
    assert horizon(plan, max_steps=7, epochs=2, cache_dir=tmp_path) == Horizon(7, estimated=False)
    assert horizon(plan, max_steps=-1, epochs=None, cache_dir=tmp_path) is None
    tokens = plan.rows.tokens[:60].sum() + 1.5 * plan.rows.tokens[60:].sum()
    estimate = horizon(plan, max_steps=None, epochs=1, cache_dir=tmp_path)
    assert estimate == Horizon(int(np.ceil(tokens / 100 / 4 / 0.998)), estimated=True)
    write_steps(plan, tmp_path, 11)
    assert horizon(plan, max_steps=-1, epochs=2, cache_dir=tmp_path) == Horizon(22, estimated=False)
    other = make_plan(rows=make_rows(videos=False), max_tokens=99)
    assert horizon(other, max_steps=-1, epochs=2, cache_dir=tmp_path).estimated, "packs of another size"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_packs_are_the_same_on_any_layout(world_size):
    rows = make_rows()
    whole = [planned.pack for planned in fixed_plan(rows, **FIXED, rank=0, world_size=1)]
    dealt = [fixed_plan(rows, **FIXED, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(packs) for packs in dealt}) == 1
    packs = [planned.pack for group in zip(*dealt, strict=True) for planned in group if planned.pack.samples]
    assert packs == whole
    assert dealt[0][0].weight_sum == pytest.approx(sum(sample_weight(int(n), "square") for n in rows.labels))


FIXED = {"max_tokens": 100, "max_tiles": 8, "reduction": "square"}


def test_a_share_holds_what_a_checkpoint_compares():
    assert of_sizes([3], [2], fingerprints=["f"]) == (Share("set0", 3, 6, "f"),)
