"""From samples to micro-batches, beside the way of the official packed dataset, in one process: `make bench`.

Both get the same samples of the made-up stream (`streams.py`) with tiles of real size. The first two rows begin with
tiles that are cut already, so they show what packing itself costs; the last two begin with JPEG files and text on disk.

The official way, written anew from its description: tiles are float32; a list of open packs is searched from the one
with the most tiles, the sample is concatenated to it, and at each yield the whole list is copied for a state that
nobody keeps. Ours plans on metadata and lays uint8 tiles side by side once.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from streams import make_stream
from torch import Tensor

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.collate import pack_samples
from ivl_lightning.data.conversation import encode_row
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.data.tiling import cut_tiles, normalize_tiles
from ivl_lightning.structures import Encoded, PlannedPack
from tests import tiny

MAX_TOKENS, MAX_TILES, BUFFER = 16_384, 64, 20
TILE_SIZE = 448
PICTURE = (1024, 768)
OpenPack = dict[str, Tensor]


def official_packs(samples: Iterator[OpenPack]) -> Iterator[OpenPack]:
    """Buffered first fit over tensors (InternVL `dataset_packed.py`: find_buffer, update_buffer, postprocess)."""
    buffers: list[OpenPack] = []
    for sample in samples:
        found = next((number for number, pack in enumerate(buffers) if fits(pack, sample)), None)
        if found is None:
            pack = {**sample, "data_index": torch.zeros_like(sample["input_ids"])}
        else:
            old = buffers.pop(found)
            index = torch.full_like(sample["input_ids"], int(old["data_index"][-1]) + 1)
            pack = {key: torch.cat([old[key], {**sample, "data_index": index}[key]]) for key in old}
        place = next((n for n, other in enumerate(buffers) if num_tiles(other) < num_tiles(pack)), len(buffers))
        buffers.insert(place, pack)
        while buffers and (num_tiles(buffers[0]) == MAX_TILES or len(buffers) > BUFFER):
            yield with_state(buffers)
    while buffers:
        yield with_state(buffers)


def with_state(buffers: list[OpenPack]) -> OpenPack:
    head = buffers.pop(0)
    copy.deepcopy({"buffer_list": buffers})
    return head


def fits(pack: OpenPack, sample: OpenPack) -> bool:
    tokens = len(pack["input_ids"]) + len(sample["input_ids"])
    return tokens <= MAX_TOKENS and num_tiles(pack) + num_tiles(sample) <= MAX_TILES


def num_tiles(pack: OpenPack) -> int:
    return len(pack["pixel_values"])


def our_packs(samples: list[Encoded]) -> Iterator[object]:
    """Plan, then lay side by side what the plan names."""
    tokens = [len(sample.input_ids) for sample in samples]
    tiles = [0 if sample.pixel_values is None else len(sample.pixel_values) for sample in samples]
    for pack in PackPlanner(MAX_TOKENS, MAX_TILES).plan(tokens, tiles):
        members = [samples[number] for number in pack.samples]
        names = [str(number) for number in pack.samples]
        yield pack_samples(
            members,
            planned=PlannedPack(pack, 0, 0, 0, 1, 1, 1.0, 0.0),
            reduction="square",
            dataset_ids=[0] * len(members),
            sample_ids=names,
            filler_id=0,
            tile_size=TILE_SIZE,
        )


def rate(count: int, packs: Callable[[], Iterator[object]]) -> float:
    """Samples per second of CPU time."""
    start = time.process_time()
    for _ in packs():
        pass
    return count / (time.process_time() - start)


def in_memory(count: int) -> tuple[float, float]:
    stream = make_stream(count, seed=0)
    rng = np.random.default_rng(0)
    ours, official = [], []
    for tokens, tiles in zip(stream.tokens.tolist(), stream.tiles.tolist(), strict=True):
        pixels = torch.from_numpy(rng.integers(0, 256, (tiles, 3, TILE_SIZE, TILE_SIZE), dtype=np.uint8))
        ids = list(range(tokens))
        ours.append(Encoded(ids, ids, pixels if tiles else None))
        # A text sample carries a blank tile there.
        official.append((torch.tensor(ids), pixels if tiles else torch.zeros(1, 3, TILE_SIZE, TILE_SIZE)))

    def samples() -> Iterator[OpenPack]:
        for ids, pixels in official:
            yield {"input_ids": ids, "labels": ids, "pixel_values": pixels.float()}

    return rate(count, lambda: official_packs(samples())), rate(count, lambda: our_packs(ours))


def write_files(folder: Path, count: int) -> Path:
    """Photo-like JPEG files and a question about each."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        noise.resize(PICTURE).save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is noise. " * 20}]
        rows.append({"image": f"{number}.jpg", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"root": ".", "annotation": "rows.jsonl", "data_augment": False, "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps({"rows": entry}))
    return folder / "meta.json"


def from_files(folder: Path, count: int) -> tuple[float, float]:
    config = DataConfig(meta=str(write_files(folder, count)), max_pack_tiles=MAX_TILES, num_workers=0)
    data = DynamicPackingDataModule(config, tiny.load_tiny_tokenizer())
    data.setup("fit")
    corpus = data.train_corpus
    assert corpus is not None

    def official() -> Iterator[OpenPack]:
        for row in range(len(corpus)):
            record = corpus.locate(row)[1].row
            with Image.open(folder / str(record["image"])) as image:
                tiles = normalize_tiles(cut_tiles(image))
            ids, labels = encode_row(record, data.tokenizer, num_image_tokens=256 * len(tiles))
            yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": tiles}

    return rate(count, lambda: official_packs(official())), rate(count, lambda: iter(data.train_dataloader()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=240)
    count = parser.parse_args().samples
    torch.set_num_threads(1)
    print("| samples per second of one worker | official way | ours | ratio |\n|---|---|---|---|")
    official, ours = in_memory(count)
    print(f"| tiles at hand, mixture of the stream | {official:.1f} | {ours:.0f} | {ours / official:.1f} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        official, ours = from_files(Path(folder), count // 4)
    print(f"| from JPEG files of {PICTURE[0]}x{PICTURE[1]} | {official:.1f} | {ours:.1f} | {ours / official:.1f} |")


if __name__ == "__main__":
    main()
