"""Running the command line on a small model and data of one's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ivl_lightning.checkpoints.complete import newest_complete, steps_of
from ivl_lightning.constants import METRICS_NAME
from ivl_lightning.reporting.logged_metrics import complete_lines, read_metrics
from tests import tiny

ROOT = Path(__file__).parents[1]


def environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "train.py", *arguments]


def train(*arguments: str, threads: int = 1, timeout: int = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(threads),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_module(name: str, *arguments: object, timeout: int, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """A module of the tests as a program, in a process of its own or as ranks of torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, "-m", name, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def kill_behind(stage: Path, checkpoint: str, *arguments: str) -> int:
    """Start a run and kill its processes (SIGKILL) once a checkpoint of this pattern stands; no stage is finished.

    Of the steps that its newest whole checkpoint holds the metrics are there.

    Returns:
        The steps of that checkpoint, behind which the next attempt begins.
    """
    process = subprocess.Popen(
        command(*arguments, f"run_dir={stage.parent}"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not list((stage / "checkpoints").glob(checkpoint)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (stage / "done.json").exists()
    newest = newest_complete(stage / "checkpoints")
    assert newest is not None
    saved = steps_of(newest)
    assert sorted(logged(stage, "train/loss"))[:saved] == list(range(1, saved + 1))
    return saved


def logged(stage: Path, name: str) -> dict[int, float]:
    """A metric by finished steps, of all attempts; of a step that was trained twice the later value."""
    return dict(read_metrics(stage).series(name))


def logged_steps(stage: Path) -> list[int]:
    """The steps of all lines, in the order in which they were written."""
    return [json.loads(line)["step"] for line in complete_lines(stage / METRICS_NAME)]


def own_arguments(folder: Path, *, steps: int) -> list[str]:
    """Write a model as transformers does, and a data set; the arguments of stage 2 on them."""
    tokenizer = tiny.load_tiny_tokenizer()
    tiny.build_tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    meta = tiny.write_tiny_data(folder / "data")
    return [
        "model=custom",
        f"model.path={folder}/model",
        f"data.meta={meta}",
        f"data.tile_size={tiny.TILE_SIZE}",
        "data.max_tokens=420",
        "data.max_pack_tiles=16",
        "data.num_workers=0",
        "data.packs_per_step=2",
        "stages=[2]",
        "stage.generation_tokens=3",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        f"trainer.max_steps={steps}",
    ]
