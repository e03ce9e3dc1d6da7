"""A sample whose loss is no number: no update is made, the sample is named, and its step can be run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from ivl_lightning.callbacks.gradient_guard import GradientGuard, NonFiniteError
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.stages.base import stage_of
from ivl_lightning.stages.mixed_preference import MixedPreference
from tests import tiny
from tests.commands import logged
from tests.commands import train as train_command
from tests.faults import bad_step_cases as cases
from tests.faults.bad_step_cases import STAGE
from tests.faults.poisoned import ROW, check_file, check_same, planned_step, poisoned_arguments


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return poisoned_arguments(tmp_path_factory.mktemp("poisoned"))


def test_one_process(arguments: list[str], tmp_path: Path) -> None:
    """The run stops in front of the planned step with the weights of the step before, and the real command shows why.

    Its checkpoint stands, so that the replay has the weights of the bad step.
    """
    config = cases.compose(arguments, tmp_path / "run")
    bad = planned_step(config.data, config.seed)
    assert bad in (2, 3), "another seed: there must be steps before it"
    seen = cases.train(config)
    assert set(seen["taken"]) == set(range(bad))
    assert seen["stopped"] == seen["taken"][bad - 1]["weights"], "no update was made"
    stage = tmp_path / "run" / STAGE
    file = stage / f"bad_steps/step={bad:08d}.json"
    check_file(file, bad, ranks=1)
    for told in (f"step {bad} (epoch 0, step {bad} of it) was not taken", ROW, str(file), f"replay={bad}"):
        assert told in seen["error"]
    assert (stage / f"checkpoints/step={bad:08d}.ckpt/complete.json").is_file()
    assert list(logged(stage, "train/loss")) == list(range(1, bad + 1)), "the save in front of the update logs nothing"
    before = sorted(path.name for path in stage.rglob("*"))

    cases.replay(config, bad - 1)
    shown = train_command(*arguments, f"run_dir={tmp_path}/run", f"replay={bad}")
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert "as in the original" in shown.stdout
    (line,) = [line for line in shown.stdout.splitlines() if line.endswith(ROW)]
    assert "not finite (nan)  text " in line
    check_file(stage / f"replay/step={bad:08d}/replay.json", bad, ranks=1)
    check_same(stage / f"replay/step={bad - 1:08d}/replay.json", seen["taken"][bad - 1])
    again = [path.name for path in stage.rglob("*") if "replay" not in path.relative_to(stage).parts]
    assert sorted(again) == before, "neither checkpoints nor logs were touched"


@pytest.mark.soak
def test_a_step_of_a_later_epoch(arguments: list[str], tmp_path: Path) -> None:
    """The first step of the second epoch from the checkpoint at the end of the first, and the next one from there too.

    Of the latter the weights are one step behind, so its gradients are others and its samples are the same.
    """
    clean = tiny.write_tiny_data(tmp_path / "data", rows=4)
    config = cases.compose(
        [*arguments, f"data.meta={clean}", "trainer.max_steps=null", "trainer.max_epochs=2", "data.packs_per_step=2"],
        tmp_path / "run",
    )
    taken = cases.train(config)["taken"]
    first = len(taken) // 2
    assert len(taken) == 2 * first
    stage = tmp_path / "run" / STAGE
    shutil.rmtree(stage / f"checkpoints/step={first + 1:08d}.ckpt")
    found = {step: json.loads((cases.replay(config, step) / "replay.json").read_text()) for step in (first, first + 1)}
    for step, again in found.items():
        assert (again["epoch"], again["step_of_epoch"]) == (1, step - first)
        assert again["steps_behind"] == step - first
        samples = [sample["sample"] for micro in again["micro_batches"] for sample in micro["samples"]]
        assert samples == taken[step]["samples"]
        same = sum(again["gradient_checksums"].values()) == taken[step]["gradients"]
        assert same is (step == first)
    with pytest.raises(ValueError, match="the run ends 1 step"):
        cases.replay(config, len(taken))


class Infinite(Callback):
    """Makes one number of the projector's gradient infinite in the second step, behind its last backward pass."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 1:
            next(stage_of(pl_module).internvl.model.multi_modal_projector.parameters()).grad.view(-1)[3] = torch.inf


def test_a_gradient_alone_on_pairs(tmp_path: Path) -> None:
    """Losses are numbers, so no pair is named; the part is. The micro-batches' shares add up to the step's loss."""
    tokenizer = tiny.load_tiny_tokenizer()
    config = tiny.tiny_data_config(
        tiny.write_tiny_pairs(tmp_path / "data"), max_tokens=1200, batch_pairs=6, packs_per_step=2
    )
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Infinite(), GradientGuard()],
        max_epochs=1,
    )
    stage = MixedPreference(lambda: tiny.build_tiny_model(tokenizer), reference="online", generation_tokens=3)
    with pytest.raises(NonFiniteError, match=r"not finite is its gradient\nNorm .*projector inf") as stopped:
        trainer.fit(stage, PreferenceDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE))
    assert "No sample's loss stands out" in str(stopped.value)
    assert trainer.global_step == 1
    content = json.loads((tmp_path / "bad_steps/step=00000001.json").read_text())
    assert content["not_finite"] == ["projector"]
    samples = [sample for micro in content["micro_batches"] for sample in micro["samples"]]
    assert len(samples) == 6
    assert all(sample["labels"] > 0 for sample in samples)
    # The published mixture divides each head's sum by the step's six pairs.
    assert content["loss"] == pytest.approx(sum(sample["loss"] for sample in samples) / 6, rel=1e-5)
