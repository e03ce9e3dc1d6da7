"""Steps of a fixed number of conversations: nothing lost or doubled, refused beforehand, alike in any packs."""

import json
from collections import Counter
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_lightning.config import schema
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.validate import validate
from ivl_lightning.data.batch_plan import BatchPlan
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.horizon import Horizon, horizon
from ivl_lightning.data.mixture import shares
from ivl_lightning.data.plan import PlanRows, PlanSettings, TrainingPlan
from ivl_lightning.data.stream import plan_settings
from ivl_lightning.launch.finished import deciding_settings
from tests import tiny

CAP_TOKENS, CAP_TILES = 100, 8
SIZES = st.lists(st.tuples(st.integers(1, CAP_TOKENS), st.integers(0, CAP_TILES)), min_size=2, max_size=80)


def make_rows(sizes, *, labels=None, videos=False):
    """Rows of these (tokens, tiles); with videos every third row is one of 2 to 4 frames, 3 tokens each."""
    tokens, tiles = (np.array(column, dtype=np.int32) for column in zip(*sizes, strict=True))
    most = np.where(np.arange(len(tokens)) % 3 == 0, 4, 0).astype(np.int16) * videos
    if labels is None:
        labels = 1 + np.arange(len(tokens)) % 9
    return PlanRows(
        tokens=np.where(most, np.minimum(tokens + 12, CAP_TOKENS), tokens).astype(np.int32),
        labels=np.array(labels, dtype=np.int32),
        tiles=np.where(most, most, tiles).astype(np.int32),
        most_frames=most,
        fewest_frames=(most // 2).astype(np.int16),
        frame_tokens=np.array([0, 0, 3, 6, 9]),
    )


def make_plan(rows, batch, packs_per_step, *, repeats=(1.0, 1.0), **changes):
    """Two data sets, the first a third of the rows; without a batch the plan that fills packs."""
    first = max(len(rows) // 3, 1)
    mixture = shares(["one", "two"], [first, len(rows) - first], repeats)
    options = {"max_tokens": CAP_TOKENS, "max_tiles": CAP_TILES, "seed": 3, "reduction": "square", "max_frames": 4}
    options = {**options, "pool_size": 4, "cost": (1.0, 0.1, 5.0), **changes}
    kind = TrainingPlan if batch is None else BatchPlan
    return kind(rows, mixture, PlanSettings(packs_per_step, batch_samples=batch, **options))


def samples_of(step):
    return [sample for pack in step.packs for sample in pack.samples]


def frames_of(plan, epoch):
    """Frames of each sample of an epoch."""
    drawn = {}
    for step in plan.epoch(epoch):
        for pack in step.packs:
            drawn |= dict(zip(pack.samples, pack.frames or (0,) * len(pack.samples), strict=True))
    return drawn


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 12), st.integers(0, 3), st.sampled_from([(1.0, 1.0), (2.5, 0.5)]), st.booleans())
def test_an_epoch_uses_every_sample_once(sizes, batch, epoch, repeats, videos):
    """Where each sample may have a pack of its own every step fits: ceil(samples / batch) steps of `batch` samples,
    the last one of what is left, each pack under the caps with the frames it names, and the normaliser of a step is
    the sum of sqrt(labels) over its samples.
    """
    plan = make_plan(make_rows(sizes, videos=videos), batch, batch, repeats=repeats)
    steps = list(plan.epoch(epoch))
    everything = [sample for step in steps for sample in samples_of(step)]
    assert len(everything) == len(set(everything)) == plan.samples_per_epoch == steps[-1].consumed
    counts = [len(samples_of(step)) for step in steps]
    assert counts[:-1] == [batch] * (len(steps) - 1)
    assert counts[-1] == plan.samples_per_epoch - batch * (len(steps) - 1)
    assert len(steps) == int(np.ceil(plan.samples_per_epoch / batch)) == plan.steps_per_epoch
    for step in steps:
        assert len(step.packs) == len(step.costs) == batch
        assert list(step.costs) == sorted(step.costs)
        for pack in step.packs:
            frames = pack.frames or (0,) * len(pack.samples)
            sizes_of_pack = [
                plan.rows.planned_tokens(sample % len(plan.rows), count)
                for sample, count in zip(pack.samples, frames, strict=True)
            ]
            assert pack.tokens == sum(sizes_of_pack) <= CAP_TOKENS
            assert pack.tiles <= CAP_TILES
        labels = plan.rows.labels[np.array(samples_of(step)) % len(plan.rows)]
        assert step.weight_sum == pytest.approx(np.sqrt(labels).sum())


def test_the_normaliser_by_hand():
    """Labels 1, 4, 9, 16, 25: square weights 1, 2, 3, 4, 5. Of one step 15; of steps of 2, 2 and 1 each its own sum."""
    rows = make_rows([(10, 0)] * 5, labels=[1, 4, 9, 16, 25])
    (step,) = make_plan(rows, 5, 2).epoch(0)
    assert step.weight_sum == 15.0
    steps = list(make_plan(rows, 2, 2).epoch(0))
    assert [step.weight_sum for step in steps] == [sum(sample + 1.0 for sample in samples_of(step)) for step in steps]
    assert sum(step.weight_sum for step in steps) == 15.0


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 9), st.integers(0, 2))
def test_packs_do_not_decide_what_a_step_learns(sizes, batch, epoch):
    """The same samples, frames and normaliser in each step whether batch or three times as many packs share them."""
    rows = make_rows(sizes, videos=True)
    few, many = (make_plan(rows, batch, packs) for packs in (batch, 3 * batch))
    for one, other in zip(few.epoch(epoch), many.epoch(epoch), strict=True):
        assert sorted(samples_of(one)) == sorted(samples_of(other))
        assert one.weight_sum == other.weight_sum
        assert one.state == other.state
    assert frames_of(few, epoch) == frames_of(many, epoch)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 9), st.integers(0, 2))
def test_any_layout_deals_the_same_packs(sizes, batch, epoch):
    """Over 1, 2 and 4 ranks: the union of what they get in a step = its packs, its numbers are the same everywhere."""
    plan = make_plan(make_rows(sizes), batch, 4 * batch)
    for world_size in (1, 2, 4):
        dealt = [list(plan.deal(plan.epoch(epoch), rank, world_size)) for rank in range(world_size)]
        assert len({len(packs) for packs in dealt}) == 1
        for step in plan.epoch(epoch):
            mine = [planned for packs in dealt for planned in packs if planned.step == step.number]
            assert Counter(planned.pack for planned in mine) == Counter(step.packs)
            assert {planned.weight_sum for planned in mine} == {step.weight_sum}
            assert {planned.step_samples for planned in mine} == {len(samples_of(step))}
            assert {planned.num_micro_steps * world_size for planned in mine} == {4 * batch}


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 9), st.integers(0, 3), st.data())
def test_continuation_is_equal_at_every_cut(sizes, batch, epoch, data):
    """The steps behind the state of step k = the steps k + 1, k + 2, ... of the uncut plan; a state is a few bytes."""
    rows = make_rows(sizes, videos=True)
    whole = list(make_plan(rows, batch, batch, repeats=(1.5, 1.0)).epoch(epoch))
    cut = data.draw(st.integers(0, len(whole) - 1))
    state = json.loads(json.dumps(whole[cut].state))
    assert len(json.dumps(state)) < 100
    assert list(make_plan(rows, batch, batch, repeats=(1.5, 1.0)).epoch(epoch, state)) == whole[cut + 1 :]


@pytest.mark.parametrize("epoch", [0, 3])
def test_frames_are_those_of_the_plan_that_fills_packs(epoch):
    """Drawn from (seed, epoch, sample): how samples are put into steps has no say."""
    rows = make_rows([(20, 2)] * 60, videos=True)
    filled, counted = (frames_of(make_plan(rows, batch, 6, repeats=(2.0, 1.0)), epoch) for batch in (None, 12))
    assert counted == filled
    assert set(counted.values()) == {0, 2, 3, 4}
    assert counted != frames_of(make_plan(rows, 12, 6, repeats=(2.0, 1.0)), epoch + 1)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 12), st.integers(1, 4), st.integers(0, 2))
def test_a_step_that_does_not_fit_is_refused_before_the_first_one(sizes, batch, packs_per_step, epoch):
    """Either every step is under the caps, or the epoch is refused whole; the number it names is enough for it."""
    rows = make_rows(sizes)
    plan = make_plan(rows, batch, packs_per_step)
    try:
        steps = plan.epoch(epoch)
    except ValueError as error:
        text = str(error)
        assert f"but data.packs_per_step={packs_per_step}: raise it" in text
        assert f"or lower data.batch_samples={batch}" in text
        assert f"epoch {epoch}, step " in text
        needed = int(text.split(" samples fill ")[1].split()[0])
        enough = int(text.split("multiple of the ranks; ")[1].split()[0])
        assert packs_per_step < needed <= enough == plan.packs_needed(epoch)
        make_plan(rows, batch, enough).prepare(epoch)
        return
    for step in steps:
        assert all(pack.tokens <= CAP_TOKENS and pack.tiles <= CAP_TILES for pack in step.packs)


def test_numbers_of_a_refusal_by_hand():
    """Four samples of 60 tokens, packs of 100: no two share one, so they fill 4 packs where there are 3."""
    plan = make_plan(make_rows([(60, 0)] * 4), 4, 3)
    message = (
        r"^epoch 0, step 0: its 4 samples fill 4 packs of 100 tokens and 8 tiles, but data.packs_per_step=3: raise it "
        r"\(a multiple of the ranks; 4 are enough for every step of this epoch\), or data.max_tokens and "
        r"data.max_pack_tiles, or lower data.batch_samples=4$"
    )
    with pytest.raises(ValueError, match=message):
        plan.epoch(0)


def test_a_later_epoch_that_does_not_fit_is_refused_at_the_start():
    """Two epochs of the same samples: where only the second one's steps need more packs, `check` says so, if the run
    is to come so far. The plan that fills packs has nothing to refuse.
    """
    for seed in range(50):
        sizes = np.random.default_rng(seed).integers(1, CAP_TOKENS, 24).tolist()
        rows = make_rows([(size, 0) for size in sizes])
        plan = make_plan(rows, 6, 4, epochs=2)
        needed = [plan.packs_needed(epoch) for epoch in (0, 1)]
        if needed[0] <= 4 < needed[1]:
            break
    else:
        raise AssertionError("no seed gives such data")
    plan.check(0, max_steps=4)
    with pytest.raises(ValueError, match="epoch 1, step"):
        plan.check(0, max_steps=None)
    assert len(list(plan.epoch(0))) == 4, "a refusal leaves nothing behind"
    make_plan(rows, None, 4, epochs=2).check(0, max_steps=None)


def test_the_horizon_is_exact(tmp_path):
    """25 samples, 6 a step: 5 steps an epoch, 15 in three; nothing to estimate, whatever the packs hold."""
    plan = make_plan(make_rows([(50, 2)] * 25), 6, 6)
    assert plan.steps_per_epoch == plan.fewest_steps() == 5
    assert horizon(plan, max_steps=None, epochs=3, cache_dir=tmp_path) == Horizon(15, estimated=False)
    assert horizon(plan, max_steps=7, epochs=3, cache_dir=tmp_path) == Horizon(7, estimated=False)
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_are_named():
    rows = make_rows([(5, 0)] * 4)
    with pytest.raises(ValueError, match=r"data.batch_samples=0 must be at least 1"):
        make_plan(rows, 0, 1)
    with pytest.raises(ValueError, match=r"no row to train on"):
        make_plan(rows, 2, 2, repeats=(0.0, 0.0))
    bare = make_plan(make_rows([(5, 0)] * 4, labels=[0, 0, 0, 7]), 1, 1)
    with pytest.raises(ValueError, match=r"its 1 samples have no label to train on.*or raise data.batch_samples"):
        bare.prepare(0)


def run_config(rows="conversations", **data):
    return schema.RunConfig(
        seed=0,
        run_dir="RUN",
        stage=schema.StageConfig(_target_="x", name="stage", rows=rows),
        model=schema.ModelConfig(),
        data=schema.DataConfig(meta="m", **data),
        loss=schema.LossConfig(),
        optim=schema.OptimConfig(),
        trainer=schema.TrainerConfig(),
        strategy=schema.StrategyConfig(),
    )


@pytest.mark.parametrize(
    ("batch", "packs", "message"),
    [
        (3, 4, r"data.batch_samples=3 is less than data.packs_per_step=4, so packs would stay empty: lower"),
        (0, 1, r"data.batch_samples=0 must be at least 1, or null to fill packs$"),
    ],
)
def test_a_batch_of_fewer_samples_than_packs_is_refused(batch, packs, message):
    with pytest.raises(ConfigError, match=message):
        validate(run_config(batch_samples=batch, packs_per_step=packs))
    validate(run_config(batch_samples=4, packs_per_step=4))
    validate(run_config(batch_samples=None, packs_per_step=4))


def test_preference_training_does_not_read_it():
    """Neither its rules between settings, nor what a finished stage learned, nor its plan know of batch_samples."""
    pairs = run_config("pairs", batch_samples=0)
    with pytest.raises(ConfigError) as error:
        validate(replace(pairs, data=replace(pairs.data, batch_pairs=0)))
    assert "batch_samples" not in str(error.value)
    assert "data.batch_samples" not in deciding_settings(pairs)
    assert deciding_settings(run_config(batch_samples=8))["data.batch_samples"] == 8
    assert plan_settings(pairs.data, seed=0, reduction="sample", pairs=True).batch_samples is None


def test_a_fit_is_refused_before_the_first_step(meta, tokenizer):
    """24 rows in a step and one pack of 256 tokens: refused at set-up, with both numbers."""
    config = tiny.tiny_data_config(meta, batch_samples=24, packs_per_step=1)
    data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    data.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(ValueError, match=r"epoch 0, step 0: its 24 samples fill \d+ packs .*data.packs_per_step=1: "):
        data.setup("fit")
