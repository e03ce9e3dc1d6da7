"""What loggers keep of a run that is stopped and goes on: the metrics file, CSV, TensorBoard and W&B, all at once."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import wandb
from hydra import initialize_config_module
from lightning.pytorch.callbacks import Checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ivl_lightning.config.schema import RunConfig
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.run_stage import run_stage, write_config
from ivl_lightning.reporting.logged_metrics import Metrics, read_metrics
from tests import tiny
from tests.commands import own_arguments
from tests.wandb_file import OfflineRun, read_offline_run

STEPS, SAVED = 5, 2
BROKEN = (1, 5, 7)


class Cut(Checkpoint):
    """Ends an attempt behind a checkpoint, before Lightning logs its step; it comes behind all callbacks that save."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED:
            raise KeyError("cut")


@dataclass
class Tracked:
    """A finished stage of two attempts.

    Attributes:
        first: metrics of the first attempt, as they were before the second.
        metrics: of both.
        wandb: an offline run of each.
    """

    config: RunConfig
    folder: Path
    first: Metrics
    metrics: Metrics
    wandb: list[OfflineRun]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """Four loggers; validation behind steps 3 and 5, a checkpoint behind step 2; a picture is gone, some are broken."""
    folder = tmp_path_factory.mktemp("tracking")
    options = ["recipe=none", *own_arguments(folder, steps=STEPS)]
    (folder / "data/9.png").unlink()
    for number in BROKEN:
        path = folder / f"data/{number}.png"
        path.write_bytes(path.read_bytes()[:-200])
    options += [
        "data.reject_limit=0.9",
        "logger=[csv,tensorboard,wandb_offline]",
        f"data.val_meta={tiny.write_tiny_data(folder / 'validation', rows=2)}",
        "trainer.val_every_n_steps=3",
        f"trainer.checkpoint_every_n_steps={SAVED}",
        "trainer.progress_bar=false",
        "callbacks.throughput.peak_tflops=0.002",
    ]
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        config = compose_stage("instruction_tuning", options, run_dir=str(folder / "run"))
    stage = folder / "run/instruction_tuning"
    cut = replace(config, callbacks={**config.callbacks, "cut": {"_target_": f"{__name__}.Cut"}})
    with pytest.raises(KeyError, match="cut"):
        attempt(cut, stage)
    first = read_metrics(stage)
    attempt(config, stage)
    # W&B's own process writes the files; it is waited for.
    wandb.teardown()
    files = sorted(stage.glob("wandb/offline-run-*/run-*.wandb"))
    return Tracked(config, stage, first, read_metrics(stage), [read_offline_run(path) for path in files])


def attempt(config: RunConfig, stage: Path) -> None:
    write_config(config, stage)
    try:
        run_stage(stage)
    finally:
        wandb.finish()


def test_what_a_checkpoint_holds_has_been_logged(run: Tracked) -> None:
    """The attempt ended behind the save of step 2, before Lightning logged that step; nothing trains it again."""
    assert list(run.first.by_step) == [1, 2]
    assert run.first.by_step[2].keys() == run.first.by_step[1].keys()
    assert [step for step, _ in run.metrics.series("train/loss")] == [1, 2, 3, 4, 5]
    assert run.metrics.by_step[2] == run.first.by_step[2]


def test_training_and_validation_count_finished_steps(run: Tracked) -> None:
    """Validations in training and behind it stand at the steps they were made after, beside those steps' losses."""
    assert [step for step, _ in run.metrics.series("val/loss")] == [3, 5]
    assert run.metrics.by_step[5].keys() > {"train/loss", "val/loss", "lr/llm", "epoch"}
    assert run.metrics.last_step == json.loads((run.folder / "done.json").read_text())["steps"] == STEPS


def test_a_dataset_without_a_sample_in_the_step_has_no_loss(run: Tracked) -> None:
    """Not the loss it had before; where it has samples its tokens grow."""
    for name in ("pictures", "text"):
        tokens, losses = (dict(run.metrics.series(f"{kind}/{name}")) for kind in ("data/tokens", "train/loss"))
        grown = [step for step in tokens if tokens[step] > tokens.get(step - 1, 0)]
        assert list(losses) == grown
        assert len(grown) > 0
    assert any("train/loss/pictures" not in finite(row) for row in run.metrics.by_step.values())


def finite(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if math.isfinite(value)}


def test_rows_left_out_are_counted_by_reason(run: Tracked) -> None:
    """One was missed when rows were measured, others when they were trained; the ledger has a line for each."""
    lines = [json.loads(line) for line in (run.folder / "ledger.jsonl").read_text().splitlines()]
    counts = Counter(f"ledger/{line['reason']}" for line in lines)
    assert sum(line["trained"] for line in lines) > 1
    assert sum(not line["trained"] for line in lines) == 1
    assert run.metrics.last("ledger/") == counts
    assert run.metrics.by_step[1].items() >= {"ledger/file_missing": 1}.items()


def test_speed_and_memory(run: Tracked) -> None:
    for row in (run.metrics.by_step[step] for step in range(1, STEPS + 1)):
        assert row["speed/mfu"] == pytest.approx(row["speed/tflops"] / 0.002)
        assert row["speed/step_seconds"] > 0
        assert 0.05 < row["memory/host_gb"] < 50
        assert "memory/device_gb" not in row


def test_wandb_goes_on_with_the_run(run: Tracked) -> None:
    """One id for both attempts, which W&B joins when they are synced."""
    assert {told.id for told in run.wandb} == {(run.folder / "wandb_id.txt").read_text()}
    assert len(run.wandb) == 2
    for told in run.wandb:
        assert (told.group, told.name, told.job_type) == (run.config.run_dir, "instruction_tuning", "train")
        assert told.tags == ["none", "custom"]


def test_wandb_has_the_settings_as_they_are(run: Tracked) -> None:
    """Nested, with numbers, booleans and nulls, none of them text."""
    for told in run.wandb:
        told.config.pop("_wandb")
        assert told.config["callbacks"].pop("cut", None) is None or told is run.wandb[0]
        assert told.config == json.loads(json.dumps(asdict(run.config)))


def test_wandb_has_the_same_numbers_over_the_same_steps(run: Tracked) -> None:
    """Its first attempt has lost the step that was cut off, as it always may."""
    assert all(told.axes == {"*": "trainer/global_step"} for told in run.wandb)
    rows = [row for told in run.wandb for row in told.history]
    for name in ("train/loss", "val/loss", "lr/llm"):
        wanted = dict(run.metrics.series(name))
        wanted.pop(SAVED, None)
        assert {row["trainer/global_step"]: row[name] for row in rows if name in row} == wanted


def test_tensorboard_has_the_same_numbers_over_the_same_steps(run: Tracked) -> None:
    found: dict[str, dict[int, float]] = {"train/loss": {}, "val/loss": {}}
    for version in sorted(run.folder.glob("tensorboard/version_*")):
        events = EventAccumulator(str(version)).Reload()
        for name in set(found) & set(events.Tags()["scalars"]):
            found[name] |= {event.step: event.value for event in events.Scalars(name)}
    for name, values in found.items():
        wanted = dict(run.metrics.series(name))
        wanted.pop(SAVED, None)
        assert values == pytest.approx(wanted)


def test_csv_is_written_beside_them(run: Tracked) -> None:
    with (run.folder / "csv/version_1/metrics.csv").open() as file:
        found = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    assert found == {step: loss for step, loss in run.metrics.series("train/loss") if step > SAVED}
