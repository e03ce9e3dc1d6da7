"""Trains networks that are read from folders on several ranks under several cases and writes what came out.

Started once, like `preference_cases`; `python -m tests.distributed.folder_cases FOLDER 1:CASE,CASE 2:CASE,...`.

A case is `strategy/network/what`. Networks, of sizes that 2 does not divide: `original` lies in the original's layout,
with queries, keys and values in one tensor and a vocabulary that grows; `hf` in transformers' layout, with one tensor
for embeddings and head; `donor` is `hf` with the tower of a donor. They are read by the loader (`folder`) or by a
function that builds them whole (`function`); `bfloat16` stores them so, and takes no step; `lora` trains adapters and
the projector.

With a donor, `whole` trains beside the frozen tower, `kept` keeps a checkpoint behind each step as well, `resume` goes
on behind the first one when the donor is gone, `spoilt` changes a number that the last rank has read, `touched` one of
the frozen tower behind the first step. `large` is for `memory_cases`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ivl_lightning.callbacks.progressive_scaling import ProgressiveScaling
from ivl_lightning.checkpoints.files import SAFETENSORS
from ivl_lightning.checkpoints.lineage import read_lineage
from ivl_lightning.config.schema import LoraSettings, ModelConfig, OptimConfig, StrategyConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.models.build import load_model
from ivl_lightning.models.loader import ConfiguredNetwork, build_model
from ivl_lightning.models.parts import vision_tower
from ivl_lightning.stages.base import Stage
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mlp_warmup import MLPWarmup
from ivl_lightning.strategies.build import build_strategy
from tests import originals, tiny
from tests.distributed import memory_cases
from tests.distributed.fit_cases import Recorder, gathered
from tests.distributed.memory_cases import PATCH_SIZE, TILE_SIZE
from tests.distributed.preference_cases import fork_group, wait

STEPS = 2
SEED = 5
SMALL_VOCABULARY = 440


def write_network(folder: Path, family: str, *, vocabulary: int, seed: int) -> Path:
    """A random checkpoint in the original's layout; MLPs of odd width."""
    config = originals.family_config(family)
    config["vision_config"]["intermediate_size"] = 41
    config["llm_config"].update(intermediate_size=65, vocab_size=vocabulary)
    tensors = originals.random_tensors(originals.shapes(config), seed)
    return originals.write_folder(folder, config, tensors, "qwen2_vit300m")


def write_tied(folder: Path, source: Path) -> None:
    """In transformers' layout, without a head of its own."""
    load_model(source).save_pretrained(folder)
    tensors = load_file(folder / SAFETENSORS)
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})
    originals.change_config(folder, tie_word_embeddings=True, text_config={"tie_word_embeddings": True})


def write_networks(folder: Path) -> None:
    """What the cases read: `original`, `hf`, `large`, a donor for each strategy, and data."""
    write_network(folder / "original", "internlm2_6b", vocabulary=SMALL_VOCABULARY, seed=0)
    write_tied(folder / "hf", write_network(folder / "source", "qwen2_300m", vocabulary=450, seed=1))
    memory_cases.write_large(folder / "large")
    for strategy in ("single", "ddp", "fsdp"):
        write_network(folder / f"donor-{strategy}", "phi3_300m", vocabulary=450, seed=2)
    tiny.write_tiny_data(folder / "data")
    tiny.write_tiny_pairs(folder / "pairs")


def settings(folder: Path, network: str, what: str) -> ModelConfig:
    name = "hf" if network == "donor" else network
    return ModelConfig(path=str(folder / name), dtype="bfloat16" if what == "bfloat16" else "float32")


def stage_of(folder: Path, case: str) -> Stage:
    _, network, what = case.split("/")
    config, tokenizer = settings(folder, network, what), tiny.load_tiny_tokenizer()
    loader = ConfiguredNetwork(config, tokenizer, seed=SEED)
    stage_class = MLPWarmup if network == "donor" else InstructionTuning
    adapters: dict[str, Any] = {
        "lora": LoraSettings(parts=["vision", "llm"], rank=4),
        "trainable": ["vision", "projector", "llm"],
    }
    stage = stage_class(
        (lambda: build_model(config, tokenizer, seed=SEED)) if what == "function" else loader,
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0),
        **(adapters if what == "lora" else {"trainable_vision_layers": 1}),
        drop_path_rate=0.3,
        activation_checkpointing=True,
        generation_tokens=1,
        sharding=sharding(case),
        seed=3,
    )
    stage.resumed = what == "resume"
    return stage


def sharding(case: str) -> StrategyConfig:
    strategy, network, _ = case.split("/")
    # With a donor, what is gathered is of another type than what is kept: neither may be taken for the other.
    dtype = "bfloat16" if network == "donor" else "float32"
    return StrategyConfig(name=strategy, param_dtype=dtype, timeout_minutes=1)


def data_of(folder: Path) -> DynamicPackingDataModule:
    config = tiny.tiny_data_config(
        folder / "data/meta.json", max_tokens=420, max_pack_tiles=8, val_rows=2, tile_size=TILE_SIZE
    )
    return DynamicPackingDataModule(config, tiny.load_tiny_tokenizer(), patch_size=PATCH_SIZE)


class Beginning(Recorder):
    """Besides losses: the network before its first step, whole, and what belongs to it on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, Tensor] = {}
        self.buffers: list[dict[str, Tensor]] = []
        self.modes: list[tuple[list[str], list[str]]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = pl_module.internvl
        self.weights = dict(whole(network))
        self.buffers = gathered(dict(network.named_buffers()))
        self.modes = gathered(modes(network))

    def found(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("losses", "gradients", "weights", "buffers", "modes")}


def whole(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters, gathered; every rank must go through them."""
    for name, parameter in network.named_parameters():
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value.clone()


def modes(network: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the modules in train mode, and of the parameters that train."""
    training = [name for name, module in network.named_modules() if module.training]
    return training, [name for name, value in network.named_parameters() if value.requires_grad]


class Spoil(Callback):
    """Adds 1 to a number of the tower on the last rank: as soon as it has been read, or behind the first step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.what == "spoilt":
            self._spoil(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.what == "touched" and trainer.global_step == 1:
            self._spoil(trainer, pl_module)

    @torch.no_grad()
    def _spoil(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            weight = vision_tower(stage.internvl).encoder.layer[1].mlp.fc1.weight
            (weight.to_local() if isinstance(weight, DTensor) else weight)[0, 0] += 1


def callbacks_of(folder: Path, case: str, recorder: Beginning) -> list[Callback]:
    strategy, network, what = case.split("/")
    if network != "donor":
        return [recorder]
    scaling = ProgressiveScaling(donor=str(folder / f"donor-{strategy}"), folder=str(folder / case))
    keep = ModelCheckpoint(dirpath=folder / case, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return [Spoil(what), recorder, scaling, *([keep] if what == "kept" else [])]


def trainer_of(folder: Path, case: str, world_size: int, recorder: Beginning) -> L.Trainer:
    _, network, what = case.split("/")
    return L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=build_strategy(sharding(case), num_ranks=world_size),
        max_steps=0 if what == "bfloat16" else STEPS,
        # Behind the last step: what a forward pass has gathered may lie about when the run ends.
        val_check_interval=STEPS * 4 // world_size,
        check_val_every_n_epoch=None,
        limit_val_batches=1 if network == "donor" else 0,
        logger=False,
        enable_checkpointing=what == "kept",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=callbacks_of(folder, case, recorder),
    )


def fit(_meta: Path, folder: Path, case: str, world_size: int) -> dict[str, Any]:
    strategy, network, what = case.split("/")
    if network == "large":
        return memory_cases.run(folder, case, world_size)
    recorder = Beginning()
    trainer, stage = trainer_of(folder, case, world_size, recorder), stage_of(folder, case)
    if what == "resume" and trainer.is_global_zero:
        shutil.rmtree(folder / f"donor-{strategy}")
    checkpoint = folder / strategy / network / "kept/step=1.ckpt" if what == "resume" else None
    error = ""
    try:
        trainer.fit(stage, data_of(folder), ckpt_path=checkpoint, weights_only=True)
    except RuntimeError as raised:
        error = str(raised)
    return {**recorder.found(), "errors": gathered(error), "lineage": lineage_of(folder / case)}


def lineage_of(folder: Path) -> dict[str, Any]:
    """Hashes of vision tower and projector, and the origins, as the stage wrote them down."""
    lineage = read_lineage(folder)
    if lineage is None:
        return {}
    parts = {part: [record.before, record.after] for part, record in lineage.parts.items()}
    return {**parts, "origins": [(Path(one.path).name, one.brings, one.donor) for one in lineage.origins]}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    groups = [(int(size), cases.split(",")) for size, cases in (entry.split(":") for entry in sys.argv[2:])]
    wait([fork_group(folder, folder, *group, fit) for group in groups])


if __name__ == "__main__":
    main()
