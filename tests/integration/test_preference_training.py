"""Preference training as a plain Lightning plugin: it learns, it stops on bad rewards, bad rows stop nothing else."""

import json
import shutil
from pathlib import Path

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from ivl_lightning.config.schema import ModelConfig, OptimConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.ledger import TooManyRejectsError
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.losses.generation import SFT
from ivl_lightning.losses.mpo import MPOLoss, PreferenceMixture
from ivl_lightning.losses.preference import SigmoidPreference
from ivl_lightning.losses.quality import BCOPair
from ivl_lightning.models.loader import ConfiguredNetwork
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mixed_preference import MixedPreference, RewardError
from tests import tiny


class Watch(Callback):
    """Pairs, losses and shift of every step, and the weights behind the last one that was taken."""

    def __init__(self):
        self.pairs, self.losses, self.shifts, self.weights = [], [], [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, *_):
        self.pairs += batch.sample_ids
        if batch.planned.micro_step + 1 == batch.planned.num_micro_steps:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.shifts.append(float(pl_module.mixture.shift))
            self.weights = {name: value.clone() for name, value in pl_module.internvl.state_dict().items()}


class Fit:
    """Stage, data, trainer and what was seen of a fit; `error` where it stopped."""

    def __init__(self, meta, tokenizer, folder, *, stage=None, data=None, callbacks=(), ckpt_path=None, **trainer):
        # What the trainer's caller says, besides giving the checkpoint.
        resumed = trainer.pop("resumed", False)
        options = {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0}
        stage = {"optim": {}, "generation_tokens": 3, **(stage or {})}
        self.stage = MixedPreference(
            stage.pop("model", lambda: tiny.build_tiny_model(tokenizer)),
            **{**stage, "optim": OptimConfig(**{**options, **stage["optim"]})},
        )
        self.stage.resumed = resumed
        caps = {"max_tokens": 1200, "batch_pairs": 6, "packs_per_step": 2, "cache_dir": str(folder.parent / "cache")}
        config = tiny.tiny_data_config(meta, **{**caps, **(data or {})})
        self.data = PreferenceDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
        self.watch, self.error = Watch(), None
        self.trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            callbacks=[self.watch, *callbacks],
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            **{"max_epochs": 1, **trainer},
        )
        try:
            self.trainer.fit(self.stage, self.data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        except ValueError as error:
            self.error = error

    def metric(self, name):
        assert self.error is None
        return float(self.trainer.callback_metrics[name])


@pytest.fixture
def pairs(tmp_path):
    return tiny.write_tiny_pairs(tmp_path / "data")


def write_colors(folder):
    """The right answer depends on the question, and in other rows on the picture alone; 96 pairs."""
    folder.mkdir()
    words = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    for word, color in words.items():
        tiny.Image.new("RGB", (32, 32), color).save(folder / f"{word}.png")
    lines = []
    for number in range(48):
        word, other = ("red", "blue") if number % 2 else ("blue", "red")
        answers = {"chosen": word, "rejected": other}
        lines.append({"id": number, "question": f"{number}: say {word}", **answers})
        lines.append({"id": number, "question": f"{number}: which color?", "image": f"{word}.png", **answers})
    (folder / "colors.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"root": ".", "annotation": "colors.jsonl", "data_augment": False, "repeat_time": 1, "max_dynamic_patch": 1}
    (folder / "colors.json").write_text(json.dumps({"colors": entry}))
    return folder / "colors.json"


def test_it_learns_what_is_preferred(tokenizer, tmp_path):
    """Held-back pairs whose answers are the same two words in both roles: 0.5 for a model that does not look.

    Reward accuracy is measured against the reference, so nothing that the model as built prefers counts.
    """
    run = Fit(
        write_colors(tmp_path / "data"),
        tokenizer,
        tmp_path / "run",
        stage={"optim": {"lr": 3e-3}},
        data={"batch_pairs": 16, "packs_per_step": 2, "max_tokens": 2400, "val_rows": 16},
        max_epochs=6,
        check_val_every_n_epoch=6,
    )
    assert len(run.data.val_corpus) == 16
    assert run.metric("val/reward_accuracy") > 0.9
    assert run.metric("val/reward_margin") > 0.1
    assert run.watch.losses[-1] < run.watch.losses[0]


def names_of(run, step):
    """Pairs of one step of 6."""
    return set(run.watch.pairs[6 * step : 6 * step + 6])


def assert_stopped(run, message, *, steps):
    """A RewardError with these words; so many steps were taken, and the weights are what they were behind the last."""
    assert isinstance(run.error, RewardError), run.error
    assert message in str(run.error)
    assert run.trainer.global_step == len(run.watch.losses) == steps
    weights = run.stage.internvl.state_dict()
    assert len(weights) == len(run.watch.weights) > 30
    assert all(torch.equal(weights[name], value) for name, value in run.watch.weights.items())


def test_rewards_beyond_the_limit_stop_before_the_update(pairs, tokenizer, tmp_path):
    """The policy begins as the reference, with rewards of 0; the second step has the first ones, and is not taken.

    The message names each pair by data set, file and line with its rewards, and what to do.
    """
    run = Fit(pairs, tokenizer, tmp_path / "run", stage={"max_reward": 1e-4})
    assert_stopped(run, "epoch 0, step 1: rewards of 6 pairs are not finite or beyond preference.max_reward", steps=1)
    lines = [line.strip() for line in str(run.error).splitlines() if " (chosen " in line]
    assert len(lines) == 6
    for line in lines:
        dataset, place = line.split(" (chosen ")[0].split(" ", 1)
        path, number = place.rsplit(":", 1)
        assert Path(path).name == f"{dataset}.jsonl"
        assert 1 <= int(number) <= 12
    assert not {line.split(" (chosen ")[0] for line in lines} & names_of(run, 0)
    assert "lower optim.lr, raise preference.beta" in str(run.error)


def test_a_learning_rate_far_too_high_is_stopped(pairs, tokenizer, tmp_path):
    """With the limit of 100 as it comes: one step at 1e3 and log-probabilities are thousands away."""
    run = Fit(pairs, tokenizer, tmp_path / "run", stage={"optim": {"lr": 1e3}})
    assert_stopped(run, "preference.max_reward=100", steps=1)


class MicroBatches(Callback):
    """Log-probabilities and loss of every micro-batch."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        pl_module.root.register_forward_hook(lambda root, inputs, logps: self.note(root, inputs[0], logps))

    def note(self, root, batch, logps):
        if root.training:
            self.seen.append([logps.detach(), batch.reference_logps, batch.response_tokens])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning hands over the loss divided by the accumulation.
        self.seen[-1].append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


def test_the_official_way_is_two_switches_away(pairs, tokenizer, tmp_path):
    """One pair a micro-batch, 6 micro-batches a step, `update` and `normaliser` at `micro_batch`: each micro-batch's
    loss is that of `MPOLoss()` fed with its log-probabilities, and so is the shift that moved 24 times in 4 steps.
    """
    parts = {
        "preference": {"weight": 0.8, "head": SigmoidPreference()},
        "quality": {"weight": 0.2, "head": BCOPair(update="micro_batch")},
        "generation": {"weight": 1.0, "head": SFT()},
    }
    stage = {"mixture": PreferenceMixture(parts), "normaliser": "micro_batch"}
    watch = MicroBatches()
    run = Fit(pairs, tokenizer, tmp_path / "run", stage=stage, data={"packs_per_step": 6}, callbacks=[watch])
    assert run.error is None
    official = MPOLoss()
    assert len(watch.seen) == 24
    for policy, reference, tokens, loss in watch.seen:
        nll = -policy[:, 0] / tokens[:, 0]
        assert loss == pytest.approx(float(official(*policy.T, *reference.T, nll).loss), rel=1e-6)
    assert float(run.stage.mixture.shift) == pytest.approx(float(official.quality.shift.mean), rel=1e-9)
    assert float(official.quality.shift.count) == 24


class Poison(Callback):
    """Makes a weight NaN before the third step, as a broken optimizer or memory would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (batch.planned.step, batch.planned.micro_step) == (2, 0):
            with torch.no_grad():
                pl_module.internvl.lm_head.weight[7, 7] = float("nan")
            self.before = {name: value.clone() for name, value in pl_module.internvl.state_dict().items()}


@pytest.mark.parametrize("reference", ["cached", "online"])
def test_weights_that_are_no_numbers_stop_before_the_update(pairs, tokenizer, tmp_path, reference):
    """All six pairs of the step are named, and nothing but the poisoned weight is NaN."""
    poison = Poison()
    run = Fit(pairs, tokenizer, tmp_path / "run", stage={"reference": reference}, callbacks=[poison])
    assert isinstance(run.error, RewardError)
    assert "epoch 0, step 2: rewards of 6 pairs are not finite" in str(run.error)
    assert str(run.error).count("(chosen nan, rejected nan)") == 6
    assert run.trainer.global_step == 2
    weights = run.stage.internvl.state_dict()
    assert sum(int(value.isnan().sum()) for value in weights.values()) == 1
    assert all(torch.equal(value.nan_to_num(), poison.before[name].nan_to_num()) for name, value in weights.items())


def test_a_stopped_run_goes_on_from_its_checkpoint(pairs, tokenizer, tmp_path):
    """The limit is raised: the step that was refused is trained, and everything is as if it had not been."""
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    stopped = Fit(pairs, tokenizer, tmp_path / "run", stage={"max_reward": 1e-4}, callbacks=[keep])
    assert isinstance(stopped.error, RewardError)
    rest = Fit(pairs, tokenizer, tmp_path / "run", ckpt_path=tmp_path / "kept/step=1.ckpt")
    whole = Fit(pairs, tokenizer, tmp_path / "whole")
    assert rest.watch.pairs == whole.watch.pairs[6:]
    assert rest.watch.losses == whole.watch.losses[1:]
    assert rest.watch.shifts == whole.watch.shifts[1:]


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_resumed_equals_never_stopped(pairs, tokenizer, tmp_path, stop):
    """Cut in mid-epoch, at its end and in the next one: pairs, losses and shift to the last bit.

    The cache is gone when the run goes on: the reference is built anew from the first weights, not taken from the
    policy, which has moved. Scored in other packs it may round otherwise, so here losses are equal to 1e-6.
    """
    whole = Fit(pairs, tokenizer, tmp_path / "whole", max_epochs=2)
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    Fit(pairs, tokenizer, tmp_path / "cut", max_epochs=2, callbacks=[keep], max_steps=stop)
    checkpoint = tmp_path / f"kept/step={stop}.ckpt"
    rest = Fit(pairs, tokenizer, tmp_path / "rest", max_epochs=2, ckpt_path=checkpoint)
    assert rest.error is None
    assert len(whole.watch.losses) == len(set(whole.watch.shifts)) == 8
    assert rest.watch.pairs == whole.watch.pairs[6 * stop :]
    assert rest.watch.losses == whole.watch.losses[stop:]
    assert rest.watch.shifts == whole.watch.shifts[stop:]
    shutil.rmtree(next((tmp_path / "cache").glob("reference-*[!k]")))
    anew = Fit(pairs, tokenizer, tmp_path / "anew", max_epochs=2, ckpt_path=checkpoint)
    assert anew.watch.losses == pytest.approx(whole.watch.losses[stop:], rel=1e-6)


def test_a_resumed_run_reads_its_folder_for_the_reference_alone(pairs, tokenizer, tmp_path):
    """The policy's weights come from the checkpoint. While the scores are there nothing else is needed; where they are
    gone, they are taken anew from the weights in the folder, in other packs, so that losses are equal to 1e-6.
    """
    tiny.build_tiny_model(tokenizer).save_pretrained(tmp_path / "model")

    def fit(name, **options):
        loader = ConfiguredNetwork(ModelConfig(path=str(tmp_path / "model")), tokenizer)
        stage = {"model": loader, "weights_id": lambda: "first"}
        return Fit(pairs, tokenizer, tmp_path / name, stage=stage, **options)

    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit("whole", callbacks=[keep])
    assert len(whole.watch.losses) == 4
    resumed = {"resumed": True, "ckpt_path": tmp_path / "kept/step=2.ckpt"}
    assert fit("rest", **resumed).watch.losses == whole.watch.losses[2:]
    shutil.rmtree(next((tmp_path / "cache").glob("reference-*[!k]")))
    assert fit("anew", **resumed).watch.losses == pytest.approx(whole.watch.losses[2:], rel=1e-6)


def test_a_trained_model_is_no_reference(pairs, tokenizer, tmp_path):
    """A ready network that was trained cannot give what it gave before; the stage says what to do."""
    model = tiny.build_tiny_model(tokenizer)
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = Fit(pairs, tokenizer, tmp_path / "run", stage={"model": model}, callbacks=[keep], max_steps=2)
    assert first.error is None
    again = Fit(
        pairs,
        tokenizer,
        tmp_path / "again",
        stage={"model": tiny.build_tiny_model(tokenizer), "weights_id": lambda: "other"},
        ckpt_path=tmp_path / "kept/step=2.ckpt",
    )
    assert "the model has been trained since: give the stage a function that builds the model" in str(again.error)


def test_drop_path_leaves_the_reference_alone(pairs, tokenizer, tmp_path):
    """The reference model is a fixed function: the same log-probabilities with stochastic depth as without."""
    tables = []
    for rate in (0.0, 0.9):
        folder = tmp_path / str(rate)
        run = Fit(pairs, tokenizer, folder / "run", stage={"drop_path_rate": rate})
        assert run.error is None
        (part,) = (folder / "cache").glob("reference-*/*.parquet")
        tables.append(pq.read_table(part))
    assert tables[0].equals(tables[1])


class Break(Callback):
    """Spoils a picture behind the reference pass, before it is trained."""

    def __init__(self, path):
        self.path = path

    def on_fit_start(self, trainer, pl_module):
        self.path.write_bytes(self.path.read_bytes()[:60])


def test_a_broken_picture_is_listed_and_the_step_goes_on(pairs, tokenizer, tmp_path):
    """A cached pass, then 3.png breaks: 23 of 24 pairs are trained in 4 steps, the ledger names the one of line 4."""
    Fit(pairs, tokenizer, tmp_path / "first")
    broken = Break(pairs.parent / "3.png")
    run = Fit(pairs, tokenizer, tmp_path / "run", data={"reject_limit": 0.1}, callbacks=[broken])
    assert run.error is None
    assert run.trainer.global_step == 4
    assert len(set(run.watch.pairs)) == len(run.watch.pairs) == 23
    assert run.data.ledger.counts == {"image_truncated": 1}
    (line,) = (json.loads(text) for text in (tmp_path / "run/ledger.jsonl").read_text().splitlines())
    assert (line["dataset"], line["line"], line["trained"], line["counted"]) == ("pictures_pairs", 4, True, True)


def test_pictures_that_cannot_be_scored_stop_before_training(pairs, tokenizer, tmp_path):
    """Broken between measuring and the reference pass, and more than `reject_limit`: no step is taken for them."""
    config = {"max_tokens": 1200, "batch_pairs": 6, "packs_per_step": 2, "cache_dir": str(tmp_path / "cache")}
    PreferenceDataModule(tiny.tiny_data_config(pairs, **config), tokenizer, patch_size=tiny.PATCH_SIZE).prepare_data()
    for number in (1, 2, 3):
        path = pairs.parent / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60])
    run = Fit(pairs, tokenizer, tmp_path / "run", data={"reject_limit": 0.1})
    assert isinstance(run.error, TooManyRejectsError)
    assert "3 of 24 rows cannot be used" in str(run.error)
    assert "pictures_pairs.jsonl:4 image_truncated" in str(run.error)
    assert run.trainer.global_step == 0


def test_plain_rows_are_named(pairs, tokenizer, tmp_path):
    """Conversations given as pairs: each row is listed with what it lacks, and nothing is trained."""
    run = Fit(pairs.parent / "meta.json", tokenizer, tmp_path / "run")
    assert isinstance(run.error, TooManyRejectsError)
    assert "24 of 24 rows cannot be used" in str(run.error)
    assert "24 pair_invalid" in str(run.error)
    assert "pictures.jsonl:1 pair_invalid: the row has conversations, but no 'question'" in str(run.error)
    assert "preference rows have question, chosen, rejected" in str(run.error)


def test_a_reference_that_gives_no_numbers_is_named(pairs, tokenizer, tmp_path):
    """Nothing is kept of it: with sound weights under the same name the pass begins anew."""

    def broken():
        model = tiny.build_tiny_model(tokenizer)
        with torch.no_grad():
            model.lm_head.weight[7, 7] = float("nan")
        return model

    run = Fit(pairs, tokenizer, tmp_path / "run", stage={"model": broken, "weights_id": lambda: "same"})
    assert "the reference model gives log-probabilities that are no numbers for pictures_pairs" in str(run.error)
    again = Fit(pairs, tokenizer, tmp_path / "again", stage={"weights_id": lambda: "same"})
    assert again.error is None


def test_the_same_weights_in_another_network_are_another_reference(pairs, tokenizer, tmp_path):
    """Rotary embeddings of another base: nothing of the first network's cache is taken."""
    shapes = tiny.tiny_config().language_model

    def model(theta):
        rope = {"rope_type": "default", "rope_theta": theta}
        return tiny.build_tiny_model(tokenizer, language_model={**shapes, "rope_parameters": rope})

    folders = []
    for theta in (1e4, 1e6, 1e4):
        stage = {"model": lambda theta=theta: model(theta), "weights_id": lambda: "same"}
        assert Fit(pairs, tokenizer, tmp_path / "run", stage=stage).error is None
        folders.append(len(list((tmp_path / "cache").glob("reference-*[!k]"))))
    assert folders == [1, 2, 2]


def test_answers_are_scored_without_held_back_pairs(pairs, tokenizer, tmp_path):
    """`generation_meta` alone: exact match is there, and no loss or reward of pairs that there are not."""
    data = {"generation_meta": str(pairs.parent / "meta.json"), "generation_rows": 4}
    run = Fit(pairs, tokenizer, tmp_path / "run", data=data)
    assert run.metric("val/exact_match") == 0.0
    assert not [name for name in run.trainer.callback_metrics if name.startswith(("val/loss", "val/reward"))]


def test_pairs_are_no_conversations(pairs, tokenizer, tmp_path):
    data = PreferenceDataModule(
        tiny.tiny_data_config(pairs, max_tokens=1200, batch_pairs=6), tokenizer, patch_size=tiny.PATCH_SIZE
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match="InstructionTuning learns from conversations"):
        trainer.fit(InstructionTuning(lambda: tiny.build_tiny_model(tokenizer)), data)


def test_the_data_module_of_conversations_is_refused(pairs, tokenizer, tmp_path):
    data = DynamicPackingDataModule(
        tiny.tiny_data_config(pairs.parent / "meta.json"), tokenizer, patch_size=tiny.PATCH_SIZE
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs a PreferenceDataModule, got DynamicPackingDataModule"):
        trainer.fit(MixedPreference(lambda: tiny.build_tiny_model(tokenizer)), data)


def test_validating_without_a_reference_is_refused(pairs, tokenizer, tmp_path):
    """`validate` alone: trained weights are no reference; online, with the trained ones as checkpoint, it works."""
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = Fit(pairs, tokenizer, tmp_path / "run", data={"val_rows": 6}, callbacks=[keep])
    wanted = run.trainer.validate(run.stage, run.data, verbose=False)[0]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    checkpoint = tmp_path / f"kept/step={run.trainer.global_step}.ckpt"

    def validate(reference):
        stage = MixedPreference(lambda: tiny.build_tiny_model(tokenizer), reference=reference, generation_tokens=3)
        data = PreferenceDataModule(run.data.config, tokenizer, patch_size=tiny.PATCH_SIZE)
        trainer = L.Trainer(default_root_dir=tmp_path / "alone", **options)
        return trainer.validate(stage, data, ckpt_path=checkpoint, verbose=False, weights_only=True)[0]

    with pytest.raises(ValueError, match="validation alone has no reference model"):
        validate("cached")
    assert wanted["val/reward_accuracy"] > 0.5
    # A trainer that only validates has finished no step.
    assert validate("online") == pytest.approx({**wanted, "step": 0}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("update", ["step", "pair", "micro_batch"])
def test_a_checkpoint_of_an_exception_holds_the_shift_of_whole_steps(pairs, tokenizer, tmp_path, update):
    """Stopped in the second micro-step of the third step: what the first one did to the shift is done anew."""

    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (batch.planned.step, batch.planned.micro_step) == (2, 1):
                raise ValueError("stopped")

    def stage():
        quality = {"weight": 0.2, "head": BCOPair(update=update)}
        return {"mixture": PreferenceMixture({"quality": quality, "generation": {"weight": 1.0, "head": SFT()}})}

    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", save_on_exception=True)
    stopped = Fit(pairs, tokenizer, tmp_path / "run", stage=stage(), callbacks=[keep, Stop()])
    assert "stopped" in str(stopped.error)
    checkpoint = next((tmp_path / "kept").glob("*.ckpt"))
    rest = Fit(pairs, tokenizer, tmp_path / "rest", stage=stage(), ckpt_path=checkpoint)
    whole = Fit(pairs, tokenizer, tmp_path / "whole", stage=stage())
    assert rest.watch.losses == whole.watch.losses[2:]
    assert rest.watch.shifts == whole.watch.shifts[2:]


def test_a_pair_that_cannot_be_read_does_not_ask_for_the_reference_again(pairs, tokenizer, tmp_path):
    """A run with one broken picture is resumed with a ready network: everything else is cached, nothing is built."""
    picture = pairs.parent / "1.png"
    picture.write_bytes(picture.read_bytes()[:200])
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    data = {"reject_limit": 0.5}
    ready = {"model": tiny.build_tiny_model(tokenizer), "weights_id": lambda: "same"}
    first = Fit(pairs, tokenizer, tmp_path / "run", stage=dict(ready), data=data, callbacks=[keep])
    assert first.error is None
    again = {"model": tiny.build_tiny_model(tokenizer), "weights_id": lambda: "same"}
    rest = Fit(pairs, tokenizer, tmp_path / "run", stage=again, data=data, ckpt_path=tmp_path / "kept/step=2.ckpt")
    assert rest.error is None
