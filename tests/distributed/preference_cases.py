"""Trains the tiny model on preference pairs on several ranks under several cases and writes what came out.

Started once: a group of ranks is forked from a process that has imported everything, which takes longer than a case.
Each group loops over its cases; `python -m tests.distributed.preference_cases META OUT 1:CASE,CASE 2:CASE ...`.

A case is `strategy/reference/what`: `whole` trains an epoch of three steps, `one_pack` has all pairs of a step in one
pack, `resumeN` goes on behind the first step of N ranks, `exploding` allows no reward beyond 1e-4, `answers` trains and
asks two questions, a picture's and a text's.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ivl_lightning.config.schema import OptimConfig
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.stages.mixed_preference import MixedPreference, RewardError
from ivl_lightning.strategies.build import build_strategy
from tests import tiny
from tests.distributed.fit_cases import Recorder, gathered, nodes_of, sharding

BATCH_PAIRS, PACKS = 8, 4
CONTINUED = {"ddp": "single", "single": "ddp"}


class PairRecorder(Recorder):
    """Besides losses and gradients: means of each step's rewards, the shift behind it, and who trained what."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []
        self.pairs: list[tuple[int, str]] = []
        self.empty = 0
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch)
        self.pairs += [(batch.planned.step, name) for name in batch.sample_ids]
        self.empty += not batch.sample_ids
        if batch.planned.micro_step + 1 == batch.planned.num_micro_steps:
            shift = pl_module.mixture.heads["quality"].shift
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.steps.append({**metrics, "mean": float(shift.mean), "count": float(shift.count)})
            if isinstance(pl_module.root, FSDPModule):
                return
            self.weights = {name: value.clone() for name, value in pl_module.root.state_dict().items()}


def fit(meta: Path, out: Path, case: str, world_size: int) -> dict[str, Any]:
    strategy, reference, what = case.split("/")
    ranks = int(what.removeprefix("resume")) if what.startswith("resume") else world_size
    settings, (devices, num_nodes) = sharding(strategy), nodes_of(world_size)
    tokenizer = tiny.load_tiny_tokenizer()
    stage = MixedPreference(
        lambda: tiny.build_tiny_model(tokenizer),
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0),
        reference=reference,
        max_reward=1e-4 if what == "exploding" else 100.0,
        generation_tokens=3,
        sharding=settings,
    )
    # A resumed run finds checkpoints and reference of the one it continues.
    folder = out / f"{strategy if ranks == world_size else CONTINUED[strategy]}-{reference}-{ranks}"
    config = tiny.tiny_data_config(
        meta,
        max_tokens=6000 if what == "one_pack" else 1200,
        max_pack_tiles=64 if what == "one_pack" else 16,
        batch_pairs=BATCH_PAIRS,
        packs_per_step=1 if what == "one_pack" else PACKS,
        val_rows=5,
        generation_meta=str(meta.parent / "meta.json"),
        generation_rows=2 if what == "answers" else 0,
        cache_dir=str(folder / "cache"),
    )
    data = PreferenceDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    recorder = PairRecorder()
    keep = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    keeps = what == "whole" and strategy in ("single", "ddp")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=build_strategy(settings, num_ranks=world_size, num_nodes=num_nodes),
        max_epochs=1,
        logger=False,
        enable_checkpointing=keeps,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0,
        default_root_dir=folder,
        callbacks=[recorder, keep] if keeps else [recorder],
    )
    checkpoint = folder / "step=1.ckpt" if what.startswith("resume") else None
    try:
        trainer.fit(stage, data, ckpt_path=checkpoint, weights_only=True)
    except RewardError as error:
        weights = stage.root.state_dict()
        same = all(torch.equal(weights[name], value) for name, value in recorder.weights.items())
        return {"errors": gathered((str(error), same, len(recorder.weights), trainer.global_step))}
    metrics = trainer.validate(stage, data, verbose=False)[0]
    parts = sorted(path.name for path in Path(config.cache_dir).glob("reference-*/*.parquet"))
    return {
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "steps": gathered(recorder.steps),
        "pairs": sorted(pair for pairs in gathered(recorder.pairs) for pair in pairs),
        "empty": sum(gathered(recorder.empty)),
        "validation": metrics,
        "parts": parts,
    }


Fit = Callable[[Path, Path, str, int], dict[str, Any]]


def run_rank(meta: Path, out: Path, rank: int, world_size: int, port: int, cases: list[str], run: Fit = fit) -> None:
    """All cases on one rank, as torchrun would have started it."""
    if world_size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False", "GROUP_RANK": 0}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in {**place, **elastic, **where}.items()})
    results = {}
    for case in cases:
        results[case] = run(meta, out, case, world_size)
        # After each case: what failed does not take the others along.
        if rank == 0:
            torch.save(results, out / f"{world_size}.pt")


def fork_group(meta: Path, out: Path, world_size: int, cases: list[str], run: Fit = fit) -> list[int]:
    """Start a group of ranks; returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world_size):
        pid = os.fork()
        if pid:
            started.append(pid)
            continue
        log = os.open(out / f"{world_size}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            run_rank(meta, out, rank, world_size, port, cases, run)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    return started


def wait(groups: list[list[int]]) -> None:
    """Until all have ended; where one rank of a group fails, the others of it, which would wait for it, are ended."""
    group_of = {pid: group for group in groups for pid in group}
    while group_of:
        pid, status = os.wait()
        group = group_of.pop(pid)
        for other in group:
            if status and other in group_of:
                os.kill(other, signal.SIGKILL)


def main() -> None:
    meta, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    groups = [(int(size), cases.split(",")) for size, cases in (entry.split(":") for entry in sys.argv[3:])]
    # The first alone: others go on from its checkpoints.
    wait([fork_group(meta, out, *groups[0])])
    wait([fork_group(meta, out, *group) for group in groups[1:]])


if __name__ == "__main__":
    main()
