"""How often two FSDP ranks reduce gradients, and what it costs, when a step has four micro-batches: `make bench`.

The instruction-tuning stage on a small network of 10 million weights and packs of few tokens, two gloo processes on
this machine, 8 packs a step. Gradients are reduced with a step's last micro-batch alone (the default), or with each one
(`strategy.sync_every_micro_batch=true`, and Lightning's own way). The two take turns; calls are counted where they
leave torch, time is the wall time of a step, the median over all turns. Losses must be equal.

Time says little here: memory of one machine is a network like no other. The number of calls holds for any.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from ivl_lightning.config.schema import OptimConfig, StrategyConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.strategies.build import build_strategy
from tests import tiny
from tests.commands import ROOT

RANKS, ACCUMULATION, STEPS = 2, 4, 4
REDUCING = ("reduce_scatter", "allreduce")
PROMISED = 1 / ACCUMULATION
WIDTH = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
WAYS = {"with each micro-batch": True, "with the last one alone": False}


class Calls(TorchDispatchMode):
    """Counts collectives by the name of their operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


class Steps(Callback):
    """Wall time and loss of each step, and the collectives of its micro-batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.calls = Calls()
        self._started = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch.planned.micro_step == 0:
            self._started = time.perf_counter()
            if trainer.global_step == STEPS - 1:
                self.calls.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.planned.micro_step + 1 < ACCUMULATION:
            return
        if trainer.global_step == STEPS:
            self.calls.__exit__(None, None, None)
        else:
            self.seconds.append(time.perf_counter() - self._started)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit(meta: Path, sync_every_micro_batch: bool) -> dict[str, Any]:
    """Four steps; the first warms up, and in the last one calls are counted, which takes time."""
    tokenizer = tiny.load_tiny_tokenizer()
    settings = StrategyConfig(name="fsdp", sync_every_micro_batch=sync_every_micro_batch, timeout_minutes=2)
    stage = InstructionTuning(
        lambda: tiny.build_tiny_model(tokenizer, language_model={**tiny.tiny_config().language_model, **WIDTH}),
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0),
        sharding=settings,
    )
    config = tiny.tiny_data_config(meta, packs_per_step=RANKS * ACCUMULATION)
    steps = Steps()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=build_strategy(settings, num_ranks=RANKS),
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=meta.parent,
        callbacks=[steps],
    )
    trainer.fit(stage, DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE))
    calls = {name: sum(n for op, n in steps.calls.counts.items() if name in op) for name in REDUCING}
    return {"seconds": steps.seconds[1:], "losses": steps.losses, "calls": calls}


def run_rank(meta: Path, out: Path, turns: int) -> None:
    torch.set_num_threads(1)
    found = [{name: fit(meta, every) for name, every in WAYS.items()} for _ in range(turns)]
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(found))


def start_ranks(folder: Path, turns: int) -> list[dict[str, Any]]:
    meta, out = tiny.write_tiny_data(folder / "data", rows=48), folder / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = ["--turns", str(turns), "--rank", str(meta), str(out)]
    process = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"the ranks failed:\n{process.stderr[-4000:]}")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rank", nargs=2, type=Path, metavar=("META", "OUT"), help="be one of the ranks")
    options = parser.parse_args()
    if options.rank:
        run_rank(*options.rank, options.turns)
        return
    with tempfile.TemporaryDirectory() as folder:
        turns = start_ranks(Path(folder), options.turns)
    every, last = (next(iter(turns))[name] for name in WAYS)
    gap = max(abs(one / other - 1) for one, other in zip(every["losses"], last["losses"], strict=True))
    print(f"{RANKS} ranks, {ACCUMULATION} micro-batches a step; losses of {STEPS} steps differ by at most {gap:.0e}\n")
    print("| gradients are reduced | reduce-scatters of a step | all-reduces | seconds |\n|---|---|---|---|")
    for name in WAYS:
        calls = turns[0][name]["calls"]
        seconds = statistics.median(second for turn in turns for second in turn[name]["seconds"])
        print(f"| {name} | {calls['reduce_scatter']} | {calls['allreduce']} | {seconds:.3f} |")
    ratio = last["calls"]["reduce_scatter"] / every["calls"]["reduce_scatter"]
    print(f"\nreduce-scatters: {ratio:.2f} of the calls")
    if gap > 1e-5:
        raise SystemExit("the two ways do not compute the same")
    if ratio > PROMISED:
        raise SystemExit(f"more than {PROMISED} of the calls")


if __name__ == "__main__":
    main()
