"""What it takes to build a network of 190 MB that is read from a folder: memory, and how much of the file.

Run by `folder_cases` as `strategy/large/what`: `memory` builds a network that trains whole, and keeps its weights as a
checkpoint; `lora` one with adapters, `online` one with a reference model beside it; `resumed` goes on from the
checkpoint, and loading it is measured too. No step is taken.
"""

from __future__ import annotations

import ctypes
import gc
import json
import threading
import time
from pathlib import Path
from typing import Any, Self

import lightning as L

# What is imported when it is first used is no part of what is measured.
import peft.tuners.lora.model  # noqa: F401
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ivl_lightning.checkpoints.source import MemorySource
from ivl_lightning.checkpoints.weights import tensors_hash
from ivl_lightning.checkpoints.writer import write_weights
from ivl_lightning.config.schema import LoraSettings, ModelConfig, StrategyConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.models.loader import ConfiguredNetwork
from ivl_lightning.stages.base import Stage
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mixed_preference import MixedPreference
from ivl_lightning.strategies.build import build_strategy
from tests import originals, tiny
from tests.distributed.fit_cases import gathered

WHAT = ("memory", "lora", "online", "resumed")
TILE_SIZE, PATCH_SIZE = 56, 14


def write_large(folder: Path) -> None:
    """190 MB of numbers, a tenth of them at most in one tensor."""
    config = originals.family_config("internlm2_6b")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
    config["llm_config"].update(sizes, num_hidden_layers=3, vocab_size=450)
    tensors = {name: torch.empty(shape).uniform_(-1, 1) for name, shape in originals.shapes(config).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(MemorySource(tensors), folder)


class AnonymousMemory:
    """How much more memory of its own this process has at most, in bytes; pages of mapped files are not counted."""

    def __init__(self) -> None:
        self.grown = 0

    def __enter__(self) -> Self:
        self._before, self._ended = anonymous_bytes(), threading.Event()
        self._watch = threading.Thread(target=self._follow)
        self._watch.start()
        return self

    def _follow(self) -> None:
        while not self._ended.is_set():
            self.grown = max(self.grown, anonymous_bytes() - self._before)
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.join()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def mapped_bytes(folder: Path) -> int:
    """Of the files in a folder, what this process has looked at: pages in its memory, of those files that are open."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if "-" in first:
            inside = len(rest) == 5 and Path(rest[-1]).parent == folder
        elif inside and first == "Rss:":
            total += 1024 * int(rest[0])
    return total


class _Watched:
    """Measures what building its network takes."""

    def configure_model(self) -> None:
        with AnonymousMemory() as self.memory:
            super().configure_model()  # type: ignore[misc]


class Tuning(_Watched, InstructionTuning): ...


class Pairs(_Watched, MixedPreference): ...


def run(folder: Path, case: str, world_size: int) -> dict[str, Any]:
    strategy, network, what = case.split("/")
    # What an earlier case has left is neither counted again nor used again.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    large = folder / network
    loader = ConfiguredNetwork(ModelConfig(path=str(large)), tiny.load_tiny_tokenizer())
    sharding = StrategyConfig(name=strategy, timeout_minutes=1)
    stage = stage_of(what, loader, sharding)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=build_strategy(sharding, num_ranks=world_size),
        max_steps=0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    checkpoint = folder / strategy / "large.ckpt"
    with AnonymousMemory() as memory:
        if what == "resumed":
            stage.resumed = True
            trainer.validate(stage, data_of(folder, what), ckpt_path=checkpoint, weights_only=True, verbose=False)
        else:
            trainer.fit(stage, data_of(folder, what))
    mapped = mapped_bytes(large)
    if what == "memory":
        trainer.save_checkpoint(checkpoint, weights_only=True)
    grown = memory.grown if what == "resumed" else stage.memory.grown
    checkpoint_says: dict[str, Any] = {"state_dict": {}}
    stage.on_save_checkpoint(checkpoint_says)
    return {
        "memory": gathered({"grown": grown, "share": own_bytes(stage), "mapped": mapped}),
        "hashes": [plain_hash(network) for network in networks_of(stage)],
        "prints": gathered(checkpoint_says.get("frozen_base", {})),
    }


def stage_of(what: str, loader: ConfiguredNetwork, sharding: StrategyConfig) -> Stage:
    if what == "online":
        return Pairs(loader, reference="online", sharding=sharding)
    lora = LoraSettings(parts=["vision", "llm"], rank=4) if what == "lora" else None
    return Tuning(loader, lora=lora, sharding=sharding)


def data_of(folder: Path, what: str) -> DynamicPackingDataModule:
    kind, meta = (PreferenceDataModule, "pairs") if what == "online" else (DynamicPackingDataModule, "meta")
    config = tiny.tiny_data_config(
        folder / f"pairs/{meta}.json", max_tokens=1200, max_pack_tiles=64, tile_size=TILE_SIZE, batch_pairs=8
    )
    return kind(config, tiny.load_tiny_tokenizer(), patch_size=PATCH_SIZE)


def networks_of(stage: Stage) -> list[nn.Module]:
    """The network, and the reference model if there is one."""
    references = stage._reference_root if isinstance(stage, MixedPreference) else ()
    return [stage.internvl, *(root.internvl for root in references)]


def own_bytes(stage: Stage) -> int:
    """Of what this rank holds of all networks."""
    values = (value for network in networks_of(stage) for value in network.parameters())
    return sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in values)


def plain_hash(network: nn.Module) -> str:
    """Of all weights but adapters; every rank must call it."""
    named = ((name.replace(".base_layer.", "."), value) for name, value in network.named_parameters())
    return tensors_hash((name, value) for name, value in named if ".lora_" not in name)
