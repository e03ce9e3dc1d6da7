"""How fast a 6B vision tower is carried to another network, against copying its file. `make bench`.

    bench_transfer.py --layers 45    the whole tower of 5.5 B weights (11 GB on disk, as much in memory)

The donor is a bare InternViT of the 6B kind with random numbers in bfloat16, in shards; the network's language model is
tiny, so that the tower is what is read. Carrying is what ProgressiveScaling has the stage's loader do: open the donor,
build the network without memory, read the tower into it, and compare every number with the file; then the hash that
lineage.json keeps. Copying ends when the copy lies on the disk. Both take turns, and the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from noise import Noise
from transformers import InternVLForConditionalGeneration

from ivl_lightning.checkpoints.weights import tensors_hash
from ivl_lightning.checkpoints.writer import write_weights
from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.conversion.json_files import write_json
from ivl_lightning.models.build import build_config
from ivl_lightning.models.donor import open_donor
from ivl_lightning.models.loader import ConfiguredNetwork
from ivl_lightning.models.parts import vision_tower
from ivl_lightning.models.streaming import empty_model
from tests import tiny

ROUNDS = 3
WIDTH, MLP, HEADS = 3200, 12_800, 25


def settings(layers: int) -> ModelConfig:
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "norm_type": "rms_norm",
        "use_qk_norm": True,
        "image_size": 448,
        "patch_size": 14,
    }
    return tiny.tiny_config(vision=vision, dtype="bfloat16")


def write_donor(folder: Path, layers: int) -> int:
    """A bare vision tower as transformers saves it; returns its bytes."""
    config = build_config(settings(layers))
    model = empty_model(config, dtype=torch.bfloat16, attention={"text_config": "sdpa", "vision_config": "sdpa"})
    folder.mkdir()
    write_weights(Noise(vision_tower(model)), folder, shard_bytes=5_000_000_000)
    write_json(folder / "config.json", config.vision_config.to_dict())
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_language_model(folder: Path) -> None:
    """The tiny model whose language model the tower is carried to."""
    tokenizer = tiny.load_tiny_tokenizer()
    tiny.build_tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def network(donor: Path, language_model: Path) -> ConfiguredNetwork:
    """A loader whose tower the donor brings."""
    config = ModelConfig(vision_path=str(donor), language_model_path=str(language_model), dtype="bfloat16")
    loader = ConfiguredNetwork(config, tiny.load_tiny_tokenizer())
    loader.register(lambda native: open_donor(str(donor)).brought_to(native, "match"))
    return loader


def carried(loader: ConfiguredNetwork) -> InternVLForConditionalGeneration:
    model = loader.build()
    loader.fill(model)
    assert not loader.not_as_brought(model)
    return model


Result = TypeVar("Result")


def timed(run: Callable[[], Result], times: list[float]) -> Result:
    start = time.monotonic()
    result = run()
    times.append(time.monotonic() - start)
    return result


def copy(source: Path, target: Path) -> None:
    """Until the copy lies on the disk."""
    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as place:
        donor, language_model, target = (Path(place) / name for name in ("donor", "language_model", "copy"))
        size = write_donor(donor, options.layers)
        write_language_model(language_model)
        taken: dict[str, list[float]] = {name: [] for name in ("copying its file", "carrying, verified", "its hash")}
        for _ in range(options.rounds):
            os.sync()
            timed(partial(copy, donor, target), taken["copying its file"])
            shutil.rmtree(target)
            os.sync()
            model = timed(partial(carried, network(donor, language_model)), taken["carrying, verified"])
            timed(partial(tensors_hash, vision_tower(model).named_parameters()), taken["its hash"])
            del model
        copying = statistics.median(taken["copying its file"])
        print(f"vision tower of {size / 1e9:.2f} GB ({options.layers} layers), {options.rounds} rounds\n")
        print("| what | seconds | of the copy's time |\n|---|---|---|")
        for name, times in taken.items():
            median = statistics.median(times)
            print(f"| {name} | {median:.2f} | {median / copying:.2f} |")


if __name__ == "__main__":
    main()
