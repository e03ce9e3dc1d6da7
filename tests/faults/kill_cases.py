"""Runs that are killed with SIGKILL and started again, beside one that is not; `python -m tests.faults.kill_cases ...`.

The first process imports everything and forks ranks, so that a start costs a second or two. A rank kills itself at a
chosen micro-batch (before its forward pass, before its backward pass, or behind it, so within a step or at its end), or
all are killed while a checkpoint is being written. What a launcher does then, this does: the other ranks are killed
too, and the same is started again. Or a rank gets SIGUSR1, within a step or in validation: then all ranks must end with
exit code 75, behind the same step.

Each rank appends a line per micro-batch: epoch, step, micro-step, loss to the last bit, samples, and numbers drawn from
the generators of Python, numpy and torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from ivl_lightning.callbacks.exact_resume import ExactResume
from ivl_lightning.callbacks.preemption import PreemptedError, Preemption
from ivl_lightning.callbacks.step_checkpoints import StepCheckpoints
from ivl_lightning.checkpoints.complete import COMPLETE_NAME, newest_complete, steps_of
from ivl_lightning.checkpoints.weights import tensors_hash
from ivl_lightning.config.schema import OptimConfig, StrategyConfig
from ivl_lightning.constants import PREEMPTED_EXIT_CODE
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.launch.metrics_file import LoggedBeforeSaved, MetricsFile
from ivl_lightning.reporting.logged_metrics import read_metrics
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.strategies.build import build_strategy
from tests import tiny
from tests.distributed.preference_cases import fork_group

STEPS, PACKS, EVERY = 9, 4, 2
MOMENTS = ("forward", "backward", "behind")
SIGNALS = ("signal", "validation")
# Until the other ranks of a group are killed behind one of them.
_GRACE_SECONDS = 0.3


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    strategy: str
    ranks: int
    workers: int
    behind: bool = False
    keep: int = 2


LAYOUTS = {
    "single": Layout("single", 1, 2),
    "ddp": Layout("ddp", 2, 1),
    "fsdp": Layout("fsdp", 2, 0),
    "behind": Layout("fsdp", 2, 0, behind=True, keep=1),
}


@dataclass(frozen=True)
class Kill:
    """When an attempt ends: at a micro-batch of a rank, or in a save after so many milliseconds."""

    moment: str
    micro_batch: int = 0
    rank: int = 0
    after: float = 0.0


class Recorder(Callback):
    """Writes what each micro-batch was and gave, and ends the process at the chosen one."""

    def __init__(self, path: Path, kill: Kill | None) -> None:
        self.path, self.kill, self.count = path, kill, 0
        self.draws: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self.count += 1
        self.draws = [random.random(), float(np.random.random()), float(torch.rand(()))]
        self._kill(trainer, "forward")
        if self.kill == Kill("signal", self.count, trainer.global_rank):
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.kill is not None and (self.kill.moment, self.kill.rank) == ("validation", trainer.global_rank):
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self.loss = float(loss).hex()
        self._kill(trainer, "backward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        planned = batch.planned
        key = [planned.epoch, planned.step, planned.micro_step]
        with self.path.open("a") as file:
            file.write(json.dumps([key, self.loss, list(batch.sample_ids), self.draws]) + "\n")
        self._kill(trainer, "behind")

    def _kill(self, trainer: L.Trainer, moment: str) -> None:
        kill = self.kill
        if kill == Kill(moment, self.count, trainer.global_rank):
            os.kill(os.getpid(), signal.SIGKILL)


def train(meta: Path, out: Path, layout: Layout, kill: Kill | None) -> dict[str, Any]:
    """One attempt on one rank: from the newest whole checkpoint to the end, or to where it is killed."""
    L.seed_everything(0, verbose=False)
    tokenizer = tiny.load_tiny_tokenizer()
    stage = InstructionTuning(
        lambda: tiny.build_tiny_model(tokenizer),
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.3),
        drop_path_rate=0.4,
        generation_tokens=2,
    )
    config = tiny.tiny_data_config(
        meta, max_tokens=420, packs_per_step=PACKS, num_workers=layout.workers, generation_rows=2, val_rows=3
    )
    data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    strategy = build_strategy(StrategyConfig(name=layout.strategy), num_ranks=layout.ranks, accelerator="cpu")
    strategy.save_behind = layout.behind
    rank = int(os.environ.get("RANK", "0"))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=layout.ranks,
        strategy=strategy,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        val_check_interval=5 * PACKS // layout.ranks,
        check_val_every_n_epoch=None,
        logger=MetricsFile(out),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=out,
        callbacks=[
            ExactResume(),
            Recorder(out / f"rank{rank}.jsonl", kill),
            Preemption(),
            StepCheckpoints(out / "checkpoints", every=EVERY, keep=layout.keep),
            LoggedBeforeSaved(),
        ],
    )
    found = newest_complete(out / "checkpoints")
    try:
        trainer.fit(stage, data, ckpt_path=found, weights_only=True if found else None)
    except PreemptedError as stop:
        os._exit(stop.exit_code)
    assert trainer.global_step == STEPS
    return {"weights": tensors_hash(stage.state_dict().items())}


def attempt(meta: Path, out: Path, layout: Layout, kill: Kill | None) -> list[int]:
    """Start all ranks and wait; their exit codes, or the signals they ended by as negative numbers."""
    group = fork_group(meta, out, layout.ranks, [""], lambda meta, out, *_: train(meta, out, layout, kill))
    if kill is not None and kill.moment == "save":
        _kill_in_save(out, group, kill)
    codes = _wait(group)
    wanted = {0} if kill is None else {0, PREEMPTED_EXIT_CODE} if kill.moment in SIGNALS else {0, 1, -signal.SIGKILL}
    assert set(codes) <= wanted, (kill, codes, [path.read_text()[-3000:] for path in out.glob("*.log")])
    return codes


def _kill_in_save(out: Path, group: list[int], kill: Kill) -> None:
    """Behind `micro_batch` saves that have begun, in the middle of the next one."""
    begun: set[str] = set()
    while len(begun) <= kill.micro_batch:
        if os.waitid(os.P_PID, group[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        begun |= {path.name for path in out.glob("checkpoints/*.ckpt") if not (path / COMPLETE_NAME).exists()}
        time.sleep(0.0002)
    time.sleep(kill.after / 1000)
    for pid in group:
        os.kill(pid, signal.SIGKILL)


def _wait(group: list[int]) -> list[int]:
    left, codes = set(group), []
    while left:
        pid, status = os.waitpid(-1, 0)
        left.discard(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        if os.WIFSIGNALED(status) and left:
            time.sleep(_GRACE_SECONDS)
            for other in left:
                os.kill(other, signal.SIGKILL)
    return codes


def run(meta: Path, out: Path, layout: Layout, kills: list[Kill]) -> dict[str, Any]:
    """Start a run again and again until it ends; what came of it."""
    out.mkdir(parents=True)
    begins, codes = [], list[list[int]]()
    for kill in [*kills, None]:
        found = newest_complete(out / "checkpoints")
        begins.append(0 if found is None else steps_of(found))
        codes.append(attempt(meta, out, layout, kill))
        if not any(codes[-1]):
            break
    lines = {rank: read(out / f"rank{rank}.jsonl") for rank in range(layout.ranks)}
    weights = torch.load(out / f"{layout.ranks}.pt", weights_only=True)[""]["weights"]
    kept = sorted(path.name for path in out.glob("checkpoints/*"))
    told = [asdict(kill) for kill in kills]
    return {
        "begins": begins,
        "codes": codes,
        "lines": lines,
        "weights": weights,
        "kept": kept,
        "kills": told,
        "logged": read_metrics(out).series("train/loss"),
    }


def read(path: Path) -> list[Any]:
    """A rank's lines; one that was cut off by a kill is left out."""
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def random_kills(layout: Layout, number: int, draw: random.Random) -> Iterator[Kill]:
    """Kills, each anywhere in the steps that are left at most."""
    micro_batches = STEPS * PACKS // layout.ranks
    for _ in range(number):
        kind = draw.random()
        if kind < 0.3:
            yield Kill("save", draw.randrange(3), after=draw.random() * 20)
        else:
            moment = draw.choice(SIGNALS if kind < 0.4 else MOMENTS)
            yield Kill(moment, 1 + draw.randrange(micro_batches * 2 // 3), draw.randrange(layout.ranks))


def _kills(layout: Layout, kind: str, draw: random.Random) -> Iterator[Kill]:
    if kind in SIGNALS:
        # Behind the first micro-batch of the third step; to the last rank alone.
        yield Kill(kind, 2 * PACKS // layout.ranks + 1, layout.ranks - 1)
    else:
        yield from random_kills(layout, int(kind), draw)


def main() -> None:
    """`FOLDER SEED LAYOUT:RUNS:KILLS ...`: of each layout a whole run, and RUNS that are killed KILLS times.

    In place of KILLS, `signal` and `validation` stop the runs within step 3, and in the validation behind step 5.
    """
    folder, draw = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    torch.set_num_threads(1)
    meta = tiny.write_tiny_data(folder / "data", rows=14)
    results: dict[str, Any] = {}
    wholes: dict[str, Any] = {}
    for entry in sys.argv[3:]:
        name, runs, kills = entry.split(":")
        layout = LAYOUTS[name]
        if name not in wholes:
            wholes[name] = run(meta, folder / name / "whole", layout, [])
        whole = wholes[name]
        killed = [
            run(meta, folder / name / f"{kills}-{number}", layout, list(_kills(layout, kills, draw)))
            for number in range(int(runs))
        ]
        results[entry] = {"whole": whole, "killed": killed}
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
