"""How fast a checkpoint is converted against copying its files, and in how much memory. `make bench`.

    bench_convert.py --layers 48    a larger one

The checkpoint is of the original's layout with an InternLM2 (fused wqkv, so that attention is not only renamed), in
bfloat16, of random numbers. Copying and converting take turns on the same disk, each followed by a flush to it; the
ratio is that of the medians. Converting is also timed with its comparison of every tensor, which reads all of both
folders once more. Memory is the peak of what the process itself holds: pages of files that are mapped do not count,
as the system takes them back at will.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from noise import Noise

from ivl_lightning.checkpoints.key_map import INTERNLM2, hf_name
from ivl_lightning.checkpoints.source import renamed
from ivl_lightning.checkpoints.views import AsOriginal
from ivl_lightning.checkpoints.writer import write_weights
from ivl_lightning.config.convert import ConvertConfig
from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.conversion.json_files import write_json
from ivl_lightning.conversion.write import write_checkpoint
from ivl_lightning.models.build import build_config
from ivl_lightning.models.checkpoint import open_checkpoint, table_of
from ivl_lightning.models.original_config import to_original
from ivl_lightning.models.streaming import empty_model

ROUNDS = 3


def model_config(layers: int) -> ModelConfig:
    vision = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 4096}
    language = {
        "model_type": "llama",
        "vocab_size": 92_553,
        "hidden_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    }
    return ModelConfig(vision={**vision, "image_size": 448, "patch_size": 14}, language_model=language)


def write_source(folder: Path, layers: int) -> int:
    config = build_config(model_config(layers))
    config.internvl_chat = to_original(config, template="internvl2_5", language=INTERNLM2)
    model = empty_model(config, dtype=torch.bfloat16, attention={"text_config": "sdpa", "vision_config": "sdpa"})
    folder.mkdir()
    write_weights(AsOriginal(Noise(model), table_of(config)), folder, shard_bytes=500_000_000)
    write_json(folder / "config.json", config.internvl_chat)
    return sum(file.stat().st_size for file in folder.iterdir())


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes that the process holds for itself beyond those at the start, at most; looked at every 5 ms."""
    start, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def anonymous() -> int:
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def seconds(run: Callable[[], object], target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start = time.monotonic()
    run()
    os.sync()
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "source", Path(place) / "target"
        size = write_source(source, layers)
        config = ConvertConfig(source=str(source), target=str(target), logits=False, shard_gb=0.5, progress_bar=False)

        def write_only() -> None:
            target.mkdir()
            write_weights(renamed(open_checkpoint(source).tensors, hf_name), target, shard_bytes=500_000_000)

        runs = {
            "copying the files": lambda: shutil.copytree(source, target),
            "converting": write_only,
            "converting and comparing every tensor": lambda: write_checkpoint(open_checkpoint(source), config),
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        with peak_memory() as peak:
            for _ in range(ROUNDS):
                for name, run in runs.items():
                    taken[name].append(seconds(run, target))
        copying = statistics.median(taken["copying the files"])
        print(f"checkpoint of {size / 1e9:.2f} GB in shards of 0.5 GB, {ROUNDS} rounds\n")
        print("| what | GB/s | of the copy's speed |\n|---|---|---|")
        for name, times in taken.items():
            median = statistics.median(times)
            print(f"| {name} | {size / 1e9 / median:.2f} | {copying / median:.0%} |")
        print(f"\npeak memory beyond the start: {peak[0] / 1e9:.2f} GB (a shard has 0.5 GB)")


if __name__ == "__main__":
    main()
