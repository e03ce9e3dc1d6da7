"""Running the command line on a small model and data of one's own."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def kill_behind(stage: Path, checkpoint: str, *arguments: str) -> None:
    """Start a run and kill its processes (SIGKILL) once a checkpoint of this pattern stands; no stage is finished.

    Lightning logs a step behind its checkpoint, so a kill in between costs the row of a step that is not trained again:
    the processes are stopped, and killed only if the newest checkpoint's row is on disk.
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
    while True:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
        if not list((stage / "checkpoints").glob(checkpoint)):
            continue
        os.killpg(process.pid, signal.SIGSTOP)
        if _newest_is_logged(stage):
            break
        os.killpg(process.pid, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (stage / "done.json").exists()


def _newest_is_logged(stage: Path) -> bool:
    newest = max(int(path.stem.partition("=")[2]) for path in (stage / "checkpoints").glob("step=*.ckpt"))
    with (stage / "csv/version_0/metrics.csv").open() as file:
        # Learning rates are rows of their own, written earlier.
        return any(row.get("step") == str(newest - 1) and row.get("train/loss") for row in csv.DictReader(file))


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
