"""Trains adapters of the tiny model on several ranks under several cases and writes what came out.

Started once, like `preference_cases`; `python -m tests.distributed.lora_cases FOLDER 1:CASE,CASE 2:CASE,...`.

A case is `strategy/kind/what`. Kinds: `tuning` trains adapters on both parts and the projector in full, `qlora` those
on a language model in 4 bits; `cached`, `online` and `adapter_off` train adapters on pairs with that reference. `whole`
trains three steps, `kept` keeps a checkpoint behind each, `resume` goes on behind the first one, `validate` only
validates behind the last one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L

# Here and not in each of the processes that are forked.
import peft.tuners.lora.model  # noqa: F401
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ivl_lightning.checkpoints.weights import full_state_dict
from ivl_lightning.config.schema import LoraSettings, OptimConfig, StrategyConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.stages.base import Stage
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mixed_preference import MixedPreference
from ivl_lightning.strategies.build import build_strategy
from tests import tiny
from tests.distributed.fit_cases import Recorder
from tests.distributed.preference_cases import fork_group, wait

STEPS = 3
BOTH = LoraSettings(parts=["vision", "llm"], rank=4)


def stage_of(kind: str) -> Stage:
    tokenizer = tiny.load_tiny_tokenizer()
    options: dict[str, Any] = {
        "optim": OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0),
        "drop_path_rate": 0.2,
        "seed": 3,
        "generation_tokens": 3,
    }

    def build() -> Any:
        return tiny.build_tiny_model(tokenizer)

    if kind == "tuning":
        return InstructionTuning(build, lora=BOTH, trainable=["vision", "projector", "llm"], **options)
    if kind == "qlora":
        return InstructionTuning(build, lora=LoraSettings(parts=["llm"], rank=4, quantize="nf4"), **options)
    return MixedPreference(build, lora=BOTH, reference=kind, **options)


def data_of(kind: str, folder: Path) -> DynamicPackingDataModule:
    tokenizer = tiny.load_tiny_tokenizer()
    if kind in ("tuning", "qlora"):
        config = tiny.tiny_data_config(folder / "data/meta.json", max_tokens=420, max_pack_tiles=8, val_rows=5)
        return DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    config = tiny.tiny_data_config(
        folder / "data/pairs.json",
        max_tokens=1200,
        batch_pairs=8,
        val_rows=5,
        generation_rows=0,
        cache_dir=str(folder / "cache"),
    )
    return PreferenceDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)


def fit(_meta: Path, out: Path, case: str, world_size: int) -> dict[str, Any]:
    strategy, kind, what = case.split("/")
    stage, recorder, kept = stage_of(kind), Recorder(), out / f"{strategy}-{kind}"
    keep = ModelCheckpoint(dirpath=kept, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=build_strategy(StrategyConfig(name=strategy), num_ranks=world_size),
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=what == "kept",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0,
        default_root_dir=out,
        callbacks=[recorder, keep] if what == "kept" else [recorder],
    )
    if what == "validate":
        checkpoint = kept / f"step={STEPS}.ckpt"
        return trainer.validate(stage, data_of(kind, out), ckpt_path=checkpoint, weights_only=True, verbose=False)[0]
    data = data_of(kind, out)
    trainer.fit(stage, data, ckpt_path=kept / "step=1.ckpt" if what == "resume" else None, weights_only=True)
    state_dict = full_state_dict(stage.internvl)
    metrics = trainer.validate(stage, data, verbose=False)[0]
    return {
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "merged": stage.merged(state_dict) if trainer.is_global_zero else {},
        "kept": sorted(stage.state_dict()),
        "validation": metrics,
    }


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    groups = [(int(size), cases.split(",")) for size, cases in (entry.split(":") for entry in sys.argv[2:])]
    wait([fork_group(out, out, *group, fit) for group in groups])


if __name__ == "__main__":
    main()
