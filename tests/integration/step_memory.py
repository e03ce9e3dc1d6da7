"""Takes training steps of a stage on full packs and writes what memory of its own the process needed.

`python -m tests.integration.step_memory CASE ...`: prints JSON, of each case the growth at its highest and what
autograd kept at the end of a forward pass, in bytes. Each in a process of its own, so that nothing else has used
memory; `--table` prints them beside the forecast.

Before the network is built a smaller one takes a step, so that threads and libraries have what they keep. Memory of the
allocator's own is kept small: blocks above 64 kB go back to the operating system.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import torch
from hydra import initialize_config_module
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ivl_lightning.config.schema import Part, RunConfig
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.network import shapes_of
from ivl_lightning.models.loader import build_model
from ivl_lightning.models.parts import text_config
from ivl_lightning.models.tokenizer import image_token_id
from ivl_lightning.planning.activations import Kept, kept
from ivl_lightning.planning.layout import layout_of
from ivl_lightning.planning.memory import Device, Memory, MicroBatch, forecast_memory
from ivl_lightning.planning.network import plan_network
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.structures import Encoded, PackedBatch
from tests import tiny
from tests.distributed.memory_cases import AnonymousMemory

DOCUMENTS = 6
"""Of a pack; as many as the miniature's packs hold."""


@dataclass(frozen=True)
class Case:
    """A stage, as changes of the miniature's stage 2.

    Attributes:
        overrides: of its configuration.
        label_share: supervised share of the tokens that are no tile's.
    """

    overrides: tuple[str, ...] = ()
    label_share: float = 0.25


CASES = {
    "miniature": Case(),
    "checkpointing": Case(("model.activation_checkpointing=true",)),
    "one micro-batch": Case(("data.packs_per_step=1",)),
    "projector alone": Case(("stage.trainable=[projector]",)),
    "last layer": Case(("stage.trainable_vision_layers=1",)),
    "text": Case(("data.max_pack_tiles=0", "data.max_tokens=4096"), label_share=1.0),
    "wider": Case(
        (
            "model.language_model.hidden_size=512",
            "model.language_model.intermediate_size=1536",
            "model.vision.hidden_size=256",
            "model.vision.intermediate_size=1024",
        )
    ),
    "wider, checkpointing": Case(
        (
            "model.language_model.hidden_size=512",
            "model.language_model.intermediate_size=1536",
            "model.language_model.num_hidden_layers=6",
            "model.vision.hidden_size=256",
            "model.vision.intermediate_size=1024",
            "model.vision.num_hidden_layers=6",
            "model.activation_checkpointing=true",
        )
    ),
    "vocabulary": Case(("+model.language_model.vocab_size=50000", "loss.chunk_rows=256", "data.max_tokens=2048")),
}


def compose(case: Case) -> RunConfig:
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        return compose_stage("instruction_tuning", ["recipe=miniature", *case.overrides], run_dir="RUN")


def micro_batch(config: RunConfig, case: Case) -> MicroBatch:
    """Full packs of a case."""
    tile_tokens = shapes_of(config.model).image_seq_length
    text = config.data.max_tokens - config.data.max_pack_tiles * tile_tokens
    rows = int(text / DOCUMENTS * case.label_share) * DOCUMENTS
    return MicroBatch(config.data.max_tokens, config.data.max_pack_tiles, rows, config.loss.chunk_rows)


def forecast(case: Case) -> tuple[Memory, Kept]:
    """Of a step of the case on the CPU, and of what autograd keeps."""
    config = compose(case)
    shapes = shapes_of(config.model)
    if "vocab_size" not in config.model.language_model:
        text_config(shapes).vocab_size = len(tiny.load_tiny_tokenizer())
    network = plan_network(shapes, trained(config), last_vision_layers=config.stage.trainable_vision_layers)
    layout, batch = layout_of(config), micro_batch(config, case)
    activations = kept(network, layout, tokens=batch.tokens, tiles=batch.tiles, rows=batch.rows, copies=True)
    return forecast_memory(network, layout, batch, Device(cuda=False)), activations


def trained(config: RunConfig) -> list[Part]:
    return config.stage.trainable or list(InstructionTuning.default_trainable)


def full_pack(config: RunConfig, case: Case, micro_step: int) -> PackedBatch:
    """A pack with as many tokens, tiles and labels as the caps allow, in documents of one length."""
    tile_tokens, batch = shapes_of(config.model).image_seq_length, micro_batch(config, case)
    rng, slot = np.random.default_rng(micro_step), image_token_id(tiny.load_tiny_tokenizer())
    documents = []
    for number in range(DOCUMENTS):
        tiles = len(range(number, batch.tiles, DOCUMENTS))
        text = len(range(number, batch.tokens - batch.tiles * tile_tokens, DOCUMENTS))
        ids = [slot] * (tiles * tile_tokens) + rng.integers(1, 400, text).tolist()
        trained_tokens = min(batch.rows // DOCUMENTS, len(ids) - 1)
        labels = [-100] * (len(ids) - trained_tokens) + ids[len(ids) - trained_tokens :]
        side = config.data.tile_size
        pixels = rng.integers(0, 256, (tiles, 3, side, side), dtype=np.uint8) if tiles else None
        documents.append(Encoded(ids, labels, None if pixels is None else torch.from_numpy(pixels)))
    return tiny.pack(documents, micro_step=micro_step)


def step(stage: InstructionTuning, optimizer: torch.optim.Optimizer, config: RunConfig, case: Case) -> None:
    """An optimizer step on full packs, as `SupervisedStage.training_step` and Lightning make it."""
    accumulation = config.data.packs_per_step
    assert stage.root is not None
    for micro_step in range(accumulation):
        batch = full_pack(config, case, micro_step)
        weighted_sum, _ = stage.root(batch)
        loss = stage.loss_head.normalise(weighted_sum, batch.loss_weights, 100.0, accumulation)
        (loss / accumulation).backward()
    clip_grad_norm_(stage.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class Saved:
    """Bytes that autograd keeps, each storage once, but for parameters."""

    def __init__(self, root: nn.Module) -> None:
        self.parameters = {value.untyped_storage().data_ptr() for value in root.parameters()}
        self.storages: dict[int, int] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def kept_by_autograd(stage: InstructionTuning, config: RunConfig, case: Case) -> int:
    """Bytes, at the end of a forward pass."""
    assert stage.root is not None
    saved = Saved(stage.root)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        result = stage.root(full_pack(config, case, 0))
    total = sum(saved.storages.values())
    del result
    return total


def build(config: RunConfig) -> tuple[InstructionTuning, torch.optim.Optimizer]:
    tokenizer = tiny.load_tiny_tokenizer()
    stage = InstructionTuning(
        lambda: build_model(config.model, tokenizer),
        trainable=config.stage.trainable,
        trainable_vision_layers=config.stage.trainable_vision_layers,
        activation_checkpointing=config.model.activation_checkpointing,
    )
    stage.loss_head.chunk_rows = config.loss.chunk_rows
    stage.configure_model()
    return stage, torch.optim.AdamW(value for value in stage.parameters() if value.requires_grad)


def warm_up(config: RunConfig, case: Case) -> None:
    """A step of a small network on small packs."""
    model = config.model
    vision = {**model.vision, "hidden_size": 32, "intermediate_size": 64}
    language = {**model.language_model, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 0}
    data = replace(config.data, max_tokens=300, max_pack_tiles=6 * (config.data.max_pack_tiles > 0))
    small = replace(config, data=data, model=replace(model, vision=vision, language_model=language))
    step(*build(small), small, case)


def measure(name: str) -> dict[str, float]:
    case = CASES[name]
    config = compose(case)
    warm_up(config, case)
    # What it leaves in cycles would be given back while the case is measured.
    gc.collect()
    with AnonymousMemory() as memory:
        stage, optimizer = build(config)
        # A peak of milliseconds may be missed once on a busy machine.
        for _ in range(3):
            step(stage, optimizer, config, case)
    return {"grown": memory.grown, "kept": kept_by_autograd(stage, config, case)}


def measured(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """By case; libraries are imported once, before."""
    torch.set_num_threads(1)
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(names, pool.map(measure, names, chunksize=1), strict=True))


def table(found: dict[str, dict[str, float]]) -> None:
    print("| case | measured MB | forecast MB | error | kept MB | forecast MB | highest at |")
    print(7 * "|---" + "|")
    for name, numbers in found.items():
        memory, own = forecast(CASES[name])
        keeps = own.vision + own.projector + own.language + own.hidden
        peaks = f"{numbers['grown'] / 1e6:.1f} | {memory.peak / 1e6:.1f} | {memory.peak / numbers['grown'] - 1:+.1%}"
        print(f"| {name} | {peaks} | {numbers['kept'] / 1e6:.1f} | {keeps / 1e6:.1f} | {memory.peak_moment} |")


def main() -> None:
    names = [argument for argument in sys.argv[1:] if argument != "--table"] or list(CASES)
    found = measured(names)
    if "--table" in sys.argv:
        table(found)
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
