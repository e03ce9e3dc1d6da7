"""A run killed with SIGKILL goes on from its newest checkpoint when the same command is given again."""

import json

import pytest

from tests.commands import kill_behind, logged, logged_steps, own_arguments, train

STEPS = 12


@pytest.mark.soak
def test_killed_and_started_again(tmp_path):
    """Losses of every step equal those of a run that was never killed; the second start does not begin at step 0."""
    options = [
        *own_arguments(tmp_path, steps=STEPS),
        "stage.drop_path_rate=0.0",
        "trainer.checkpoint_every_n_steps=1",
    ]
    killed, stage = tmp_path / "killed", tmp_path / "killed/instruction_tuning"
    saved = kill_behind(stage, "step=0000000[3-9].ckpt", *options)
    lines = len(logged_steps(stage))

    other = train(*options, f"run_dir={killed}", "optim.lr=0.5")
    assert other.returncode == 1
    assert "was begun with optim.lr=4e-05, this command says 0.5" in other.stderr.replace("\n", " ")
    again = train(*options, f"run_dir={killed}")
    assert again.returncode == 0, again.stderr[-3000:]
    whole = train(*options, f"run_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr[-3000:]

    assert json.loads((stage / "done.json").read_text())["steps"] == STEPS
    assert min(logged_steps(stage)[lines:]) == saved + 1
    wanted = logged(tmp_path / "whole/instruction_tuning", "train/loss")
    assert sorted(wanted) == list(range(1, STEPS + 1))
    assert logged(stage, "train/loss") == wanted
