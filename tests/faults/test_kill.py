"""A run killed with SIGKILL goes on from its newest checkpoint when the same command is given again."""

import csv
import json
from pathlib import Path

import pytest

from tests.commands import kill_behind, own_arguments, train

STEPS = 12


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, of all attempts; a step that was trained twice keeps the later value."""
    found = {}
    for path in sorted((run / "instruction_tuning/csv").glob("version_*/metrics.csv")):
        with path.open() as file:
            found |= {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    return found


@pytest.mark.soak
def test_killed_and_started_again(tmp_path):
    """Losses of every step equal those of a run that was never killed; the second start does not begin at step 0."""
    options = [
        *own_arguments(tmp_path, steps=STEPS),
        "stage.drop_path_rate=0.0",
        "trainer.checkpoint_every_n_steps=1",
        "logger.csv.flush_logs_every_n_steps=1",
    ]
    killed = tmp_path / "killed"
    kill_behind(killed / "instruction_tuning", "step=0000000[3-9].ckpt", *options)

    other = train(*options, f"run_dir={killed}", "optim.lr=0.5")
    assert other.returncode == 1
    assert "was begun with optim.lr=4e-05, this command says 0.5" in other.stderr.replace("\n", " ")
    again = train(*options, f"run_dir={killed}")
    assert again.returncode == 0, again.stderr[-3000:]
    whole = train(*options, f"run_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr[-3000:]

    assert json.loads((killed / "instruction_tuning/done.json").read_text())["steps"] == STEPS
    second = (killed / "instruction_tuning/csv/version_1/metrics.csv").read_text().splitlines()
    first_step = min(int(row["step"]) for row in csv.DictReader(second) if row["train/loss"])
    assert first_step >= 3
    assert losses(killed) == losses(tmp_path / "whole")
    assert len(losses(killed)) == STEPS
