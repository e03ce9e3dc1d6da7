"""The plan of preference pairs: nothing lost or doubled, steps of a fixed size, spread by cost, refused beforehand."""

import json
from collections import Counter

import lightning as L
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_lightning.config.schema import OptimConfig
from ivl_lightning.data.horizon import Horizon, horizon
from ivl_lightning.data.mixture import shares
from ivl_lightning.data.pair_plan import PairPlan, PairRows
from ivl_lightning.data.plan import PlanSettings
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.reweighting import sample_weight
from ivl_lightning.stages.mixed_preference import MixedPreference
from tests import tiny

CAP_TOKENS, CAP_TILES = 100, 8
SIZES = st.lists(st.tuples(st.integers(1, CAP_TOKENS), st.integers(0, CAP_TILES)), min_size=2, max_size=80)


def make_rows(sizes, *, videos=False, seed=0):
    """Rows of these (tokens, tiles); with videos every third row is one of 2 to 4 frames, 3 tokens each."""
    rng = np.random.default_rng(seed)
    tokens, tiles = (np.array(column, dtype=np.int32) for column in zip(*sizes, strict=True))
    most = np.where(np.arange(len(tokens)) % 3 == 0, 4, 0).astype(np.int16) * videos
    labels = rng.integers(2, 20, len(tokens)).astype(np.int32)
    return PairRows(
        tokens=tokens + 12 * (most > 0),
        labels=labels,
        tiles=np.where(most, most, tiles).astype(np.int32),
        most_frames=most,
        fewest_frames=(most // 2).astype(np.int16),
        frame_tokens=np.array([0, 0, 3, 6, 9]),
        chosen_labels=(labels // 2).astype(np.int32),
        digests=rng.integers(0, 2**63, len(tokens)).astype(np.uint64),
    )


def make_plan(sizes, batch, packs_per_step, *, repeats=(1.0, 1.0), rows=None, **changes):
    """Two data sets, the first a third of the rows."""
    rows = make_rows(sizes) if rows is None else rows
    first = max(len(rows) // 3, 1)
    mixture = shares(["one", "two"], [first, len(rows) - first], repeats)
    options = {"max_tokens": CAP_TOKENS, "max_tiles": CAP_TILES, "seed": 3, "max_frames": 4, **changes}
    plan_options = PlanSettings(
        packs_per_step, pool_size=4, reduction="sample", batch_pairs=batch, **options, cost=(1.0, 0.1, 5.0)
    )
    return PairPlan(rows, mixture, plan_options)


def samples_of(step):
    return [sample for pack in step.packs for sample in pack.samples]


def costs_of(plan, samples):
    """a * tokens + b * tokens^2 + c * tiles of each pair, with the costs of `make_plan`."""
    rows = np.array(samples) % len(plan.rows)
    tokens, tiles = plan.rows.tokens[rows].astype(float), plan.rows.tiles[rows]
    return tokens + 0.1 * tokens**2 + 5.0 * tiles


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 12), st.integers(0, 3), st.sampled_from([(1.0, 1.0), (2.5, 0.5), (1.0, 3.0)]))
def test_an_epoch_uses_every_pair_once(sizes, batch, epoch, repeats):
    """Where each pair may have a pack of its own, every step fits: `batch` pairs a step but for the last, under the
    caps, packs by rising cost, and the divisor of the generation loss is that of the chosen answers.
    """
    plan = make_plan(sizes, batch, batch, repeats=repeats)
    steps = list(plan.epoch(epoch))
    everything = [sample for step in steps for sample in samples_of(step)]
    assert len(everything) == len(set(everything)) == plan.samples_per_epoch == steps[-1].consumed
    counts = [len(samples_of(step)) for step in steps]
    assert counts[:-1] == [batch] * (len(steps) - 1)
    assert 1 <= counts[-1] <= batch
    assert len(steps) == plan.steps_per_epoch == plan.fewest_steps()
    assert [step.number for step in steps] == list(range(len(steps)))
    for step in steps:
        assert len(step.packs) == batch
        used = [pack for pack in step.packs if pack.samples]
        assert step.packs[len(step.packs) - len(used) :] == tuple(used), "empty packs cost least and stand first"
        for pack in used:
            rows = np.array(pack.samples) % len(plan.rows)
            assert pack.tokens == plan.rows.tokens[rows].sum() <= CAP_TOKENS
            assert pack.tiles == plan.rows.tiles[rows].sum() <= CAP_TILES
        costs = list(step.costs)[len(step.packs) - len(used) :]
        assert list(step.costs) == sorted(step.costs)
        assert costs == pytest.approx([costs_of(plan, pack.samples).sum() for pack in used])
        rows = np.array(samples_of(step)) % len(plan.rows)
        wanted = sum(sample_weight(int(count), "sample") for count in plan.rows.chosen_labels[rows])
        assert step.weight_sum == pytest.approx(wanted)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 16), st.integers(1, 6))
def test_work_is_balanced_where_no_cap_binds(sizes, batch, packs_per_step):
    """Longest processing time first: when a pair of cost c is put on the cheapest pack, that pack has at most the mean
    of all the others' work, so no pack ends above mean + largest cost of a pair.

    And no pack stays empty that a pair could have had.
    """
    plan = make_plan(sizes, batch, packs_per_step, max_tokens=10**6, max_tiles=10**6)
    for step in plan.epoch(0):
        costs = costs_of(plan, samples_of(step))
        assert max(step.costs) <= costs.sum() / packs_per_step + costs.max() + 1e-6
        assert sum(1 for pack in step.packs if pack.samples) == min(packs_per_step, len(costs))


def test_balance_by_hand():
    """Costs 9, 7, 6, 5, 5 on two packs, each to the cheaper one: 9 | 7, 9 | 13, 14 | 13, 14 | 18."""
    sizes = [(tokens, 0) for tokens in (9, 7, 6, 5, 5)]
    rows = make_rows(sizes)
    options = PlanSettings(2, 100, 1, 4, seed=0, reduction="token", batch_pairs=5, cost=(1.0, 0.0, 0.0))
    (step,) = PairPlan(rows, shares(["all"], [5], [1]), options).epoch(0)
    assert step.costs == (14.0, 18.0)
    assert [sorted(rows.tokens[list(pack.samples)]) for pack in step.packs] == [[5, 9], [5, 6, 7]]


def test_caps_come_before_balance():
    """Tokens 60, 40, 40, 30, 30 in two packs of 100: by work 60 + 30 | 40 + 40, and the last 30 finds no room.

    60 + 40 | 40 + 30 + 30 fits exactly, which filling the fullest pack first finds.
    """
    rows = make_rows([(tokens, 0) for tokens in (60, 40, 40, 30, 30)])
    options = PlanSettings(2, 100, 1, 4, seed=0, reduction="token", batch_pairs=5, cost=(1.0, 0.0, 0.0))
    (step,) = PairPlan(rows, shares(["all"], [5], [1]), options).epoch(0)
    assert [pack.tokens for pack in step.packs] == [100, 100]


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 12), st.integers(1, 4), st.integers(0, 2))
def test_a_step_that_does_not_fit_is_refused_with_both_numbers(sizes, batch, packs_per_step, epoch):
    """Either every step is under the caps, or the plan is refused whole, and no step was handed out.

    The number it names is enough for that step, and more than there are.
    """
    plan = make_plan(sizes, batch, packs_per_step)
    try:
        plan.prepare(epoch)
    except ValueError as error:
        text = str(error)
        needed = int(text.split(" pairs fill ")[1].split()[0])
        assert needed > packs_per_step
        assert f"data.packs_per_step={packs_per_step}" in text
        assert f"data.batch_pairs={batch}" in text
        assert f"epoch {epoch}, step " in text
        with pytest.raises(ValueError, match=f"pairs fill {needed} packs of {CAP_TOKENS} tokens and {CAP_TILES} tiles"):
            plan.epoch(epoch)
        assert plan.packs_needed(epoch) >= needed
        make_plan(sizes, batch, plan.packs_needed(epoch)).prepare(epoch)
        return
    for step in plan.epoch(epoch):
        assert all(pack.tokens <= CAP_TOKENS and pack.tiles <= CAP_TILES for pack in step.packs)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, 2))
def test_any_layout_deals_the_same_step(sizes, batch, world_size, epoch):
    """The union over ranks and micro-steps of a step = its packs; its divisors are the same everywhere."""
    plan = make_plan(sizes, batch, 4 * batch)
    dealt = [list(plan.deal(plan.epoch(epoch), rank, world_size)) for rank in range(world_size)]
    assert len({len(packs) for packs in dealt}) == 1
    for step in plan.epoch(epoch):
        mine = [planned for packs in dealt for planned in packs if planned.step == step.number]
        assert Counter(planned.pack for planned in mine) == Counter(step.packs)
        assert {planned.weight_sum for planned in mine} == {step.weight_sum}
        assert {planned.step_samples for planned in mine} == {len(samples_of(step))}
        assert {planned.num_micro_steps * world_size for planned in mine} == {4 * batch}
        assert {planned.packs_per_step for planned in mine} == {4 * batch}


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 9), st.integers(0, 3), st.data())
def test_continuation_is_equal_at_every_cut(sizes, batch, epoch, data):
    """The steps behind the state of step k = the steps k + 1, k + 2, ... of the uncut plan; a state is a few bytes."""
    whole = list(make_plan(sizes, batch, batch, repeats=(1.5, 1.0)).epoch(epoch))
    cut = data.draw(st.integers(0, len(whole) - 1))
    state = json.loads(json.dumps(whole[cut].state))
    assert len(json.dumps(state)) < 100
    assert list(make_plan(sizes, batch, batch, repeats=(1.5, 1.0)).epoch(epoch, state)) == whole[cut + 1 :]


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 9), st.integers(1, 3), st.integers(0, 20), st.sampled_from([(1.0, 1.0), (0.4, 0.7)]))
def test_used_rows_are_what_the_run_reads(sizes, batch, epochs, max_steps, repeats):
    """Reference log-probabilities are computed for rows that steps use, and for no others."""
    sizes = sizes + [(5, 0)] * 6
    plan = make_plan(sizes, batch, batch, repeats=repeats, epochs=epochs)
    steps = [step for epoch in range(epochs) for step in plan.epoch(epoch)]
    for limit in (max_steps, None):
        read = {sample % len(plan.rows) for step in steps[:limit] for sample in samples_of(step)}
        assert set(plan.used_rows(limit).tolist()) == read
    endless = make_plan(sizes, batch, batch, repeats=repeats)
    assert endless.used_rows(None).tolist() == list(range(len(plan.rows)))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.data())
def test_scoring_packs_hold_each_row_once(sizes, data):
    """Some rows in packs under the caps, each with the frames it is trained with."""
    plan = make_plan(sizes, 4, 4, rows=make_rows([(min(t, 80), n) for t, n in sizes], videos=True))
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))))
    packs = plan.packs_of(chosen)
    assert sorted(sample for pack in packs for sample in pack.samples) == chosen.tolist()
    trained = {}
    for step in plan.epoch(2):
        for pack in step.packs:
            trained |= dict(zip(pack.samples, pack.frames or (0,) * len(pack.samples), strict=True))
    for pack in packs:
        assert pack.tokens <= CAP_TOKENS
        assert pack.tiles <= CAP_TILES
        frames = pack.frames or (0,) * len(pack.samples)
        assert [trained[sample] for sample in pack.samples] == list(frames)
        tokens = sum(plan.rows.planned_tokens(row, count) for row, count in zip(pack.samples, frames, strict=True))
        assert pack.tokens == tokens


def test_frames_of_a_pair_stay():
    """Drawn from (augmentation seed, row): the same in every epoch, use and run, so that the reference stays true."""
    rows = make_rows([(20, 0)] * 60, videos=True)

    def frames(epoch=0, **changes):
        drawn = {}
        for step in make_plan([], 6, 6, rows=rows, repeats=(2.0, 1.0), **changes).epoch(epoch):
            for pack in step.packs:
                for sample, count in zip(pack.samples, pack.frames or (0,) * len(pack.samples), strict=True):
                    assert drawn.setdefault(sample % 60, count) == count
        return drawn

    first = frames()
    assert set(first.values()) == {0, 2, 3, 4}
    assert frames(epoch=5) == frames(seed=99) == first
    assert frames(augmentation_seed=1) != first


def test_the_horizon_is_exact(tmp_path):
    """25 pairs, 6 a step: 5 steps an epoch, 15 in three; nothing to estimate, whatever the packs hold."""
    plan = make_plan([(50, 2)] * 25, 6, 6)
    assert plan.steps_per_epoch == 5
    assert horizon(plan, max_steps=-1, epochs=3, cache_dir=tmp_path) == Horizon(15, estimated=False)
    assert horizon(plan, max_steps=7, epochs=3, cache_dir=tmp_path) == Horizon(7, estimated=False)
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match=r"data.batch_pairs=0 must be at least 1"):
        make_plan([(5, 0)] * 4, 0, 1)
    with pytest.raises(ValueError, match=r"no row to train on"):
        make_plan([(5, 0)] * 4, 2, 2, repeats=(0.0, 0.0))


def test_a_later_epoch_that_does_not_fit_is_refused_at_the_start():
    """Two epochs of the same pairs: where only the second one's steps need more packs, `check` says so, if the run
    is to come so far.
    """
    for seed in range(50):
        sizes = np.random.default_rng(seed).integers(1, CAP_TOKENS, 24).tolist()
        plan = make_plan([(size, 0) for size in sizes], 6, 4, epochs=2)
        needed = [plan.packs_needed(epoch) for epoch in (0, 1)]
        if needed[0] <= 4 < needed[1]:
            break
    else:
        raise AssertionError("no seed gives such data")
    plan.prepare(0)
    plan.check(0, max_steps=4)
    with pytest.raises(ValueError, match="epoch 1, step"):
        plan.check(0, max_steps=None)


def test_a_fit_is_refused_before_the_reference_pass(tokenizer, tmp_path):
    """24 pairs in a step and one pack of 1200 tokens: refused with both numbers, no model run, nothing cached."""
    meta = tiny.write_tiny_pairs(tmp_path / "data")
    config = tiny.tiny_data_config(
        meta, max_tokens=1200, batch_pairs=24, packs_per_step=1, cache_dir=str(tmp_path / "cache")
    )
    data = PreferenceDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    built = []

    def build():
        built.append(1)
        return tiny.build_tiny_model(tokenizer)

    stage = MixedPreference(build, optim=OptimConfig(lr=1e-3))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"epoch 0, step 0: its 24 pairs fill \d+ packs .*data.packs_per_step=1: "):
        trainer.fit(stage, data)
    assert not built
    assert not list((tmp_path / "cache").glob("reference-*"))
