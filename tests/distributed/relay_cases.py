"""A run that is handed on from strategy to strategy, a step or two at a time.

Started once; forks each leg's ranks. A leg goes on from the checkpoint that the one before has left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ivl_lightning.callbacks.step_checkpoints import StepCheckpoints
from ivl_lightning.checkpoints.complete import COMPLETE_NAME, newest_complete
from ivl_lightning.checkpoints.weights import tensors_hash
from ivl_lightning.config.schema import OptimConfig, StrategyConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mlp_warmup import MLPWarmup
from ivl_lightning.strategies.build import build_strategy
from tests import tiny
from tests.distributed.preference_cases import fork_group, wait

STAGES = {"all": InstructionTuning, "frozen": MLPWarmup}
LEGS = (("fsdp", 2, 1), ("single", 1, 2), ("ddp", 2, 3), ("fsdp", 2, 5))
"""Strategy, ranks, and the step behind which it stops. The last leg goes on from an epoch's end."""


class Losses(Callback):
    """Of each step; and hashes of weights and optimizer state, before the first step and behind the last."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.hashes: list[tuple[str, str]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._hash(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if batch.planned.micro_step + 1 == batch.planned.num_micro_steps:
            self.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._hash(trainer)

    def _hash(self, trainer: L.Trainer) -> None:
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
        named = {f"{name}.{key}": value for name, entries in state.items() for key, value in entries.items()}
        weights = trainer.lightning_module.state_dict()
        self.hashes.append((tensors_hash(weights.items()), tensors_hash(named.items())))


def leg(meta: Path, out: Path, stage: str, strategy: str, ranks: int, until: int) -> dict[str, Any]:
    tokenizer = tiny.load_tiny_tokenizer()
    module = STAGES[stage](
        lambda: tiny.build_tiny_model(tokenizer), optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    )
    config = tiny.tiny_data_config(meta, max_tokens=420, max_pack_tiles=8)
    data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    losses, keep = Losses(), StepCheckpoints(out / stage, every=1, keep=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=build_strategy(StrategyConfig(name=strategy), num_ranks=ranks, accelerator="cpu"),
        max_steps=until,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=out,
        callbacks=[losses, keep],
    )
    found = newest_complete(out / stage)
    trainer.fit(module, data, ckpt_path=found, weights_only=True if found else None)
    newest = newest_complete(out / stage)
    assert newest is not None
    saved_by = json.loads((newest / COMPLETE_NAME).read_text())["ranks"]
    return {"losses": losses.losses, "hashes": losses.hashes, "ranks": saved_by}


def main() -> None:
    """`python -m tests.distributed.relay_cases FOLDER`."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    meta = tiny.write_tiny_data(folder / "data")
    results: dict[str, list[Any]] = {}
    for kind, legs in (("whole", (("single", 1, LEGS[-1][2]),)), ("relay", LEGS)):
        out = folder / kind
        out.mkdir()
        results[kind] = [one_leg(meta, out, *spec) for spec in legs]
    torch.save(results, folder / "results.pt")


def one_leg(meta: Path, out: Path, strategy: str, ranks: int, until: int) -> dict[str, Any]:
    """What the first rank of a leg found, by stage."""

    def run(meta: Path, out: Path, stage: str, _: int) -> dict[str, Any]:
        return leg(meta, out, stage, strategy, ranks, until)

    found = out / f"{ranks}.pt"
    found.unlink(missing_ok=True)
    wait([fork_group(meta, out, ranks, list(STAGES), run)])
    return cast(dict[str, Any], torch.load(found, weights_only=True))


if __name__ == "__main__":
    main()
