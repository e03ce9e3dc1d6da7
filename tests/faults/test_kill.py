"""A run killed with SIGKILL goes on from its newest checkpoint when the same command is given again."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import tiny
from tests.integration.test_chain import ROOT, train

STEPS = 12


def arguments(folder: Path) -> list[str]:
    tokenizer = tiny.load_tiny_tokenizer()
    tiny.build_tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    meta = tiny.write_tiny_data(folder / "data")
    return [
        "model=custom",
        f"model.path={folder}/model",
        f"data.meta={meta}",
        "data.tile_size=32",
        "data.max_tokens=420",
        "data.max_pack_tiles=16",
        "data.num_workers=0",
        "data.packs_per_step=2",
        "stages=[instruction_tuning]",
        "stage.drop_path_rate=0.0",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        f"trainer.max_steps={STEPS}",
        "trainer.checkpoint_every_n_steps=1",
        "logger.csv.flush_logs_every_n_steps=1",
    ]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, of all attempts; a step that was trained twice keeps the later value."""
    found = {}
    for path in sorted((run / "instruction_tuning/csv").glob("version_*/metrics.csv")):
        with path.open() as file:
            found |= {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    return found


def test_killed_and_started_again(tmp_path):
    """Losses of every step equal those of a run that was never killed; the second start does not begin at step 0."""
    options = arguments(tmp_path)
    killed = tmp_path / "killed"
    command = [sys.executable, "train.py", *options, f"run_dir={killed}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = killed / "instruction_tuning/checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step=0000000[3-9].ckpt")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "instruction_tuning/done.json").exists()

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
