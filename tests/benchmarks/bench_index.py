"""What start-up costs: measuring rows, and the first pack of a second run over a large dataset. `make bench`.

    bench_index.py --rows 10000000    the same for ten million rows

Rows per second are those of one process. For the large dataset the rows are real lines of JSON and the index is made
by the real code, but each row is measured by a stand-in, since only reading, hashing, keeping and planning are timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.annotations import read_meta
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.encoding import RowEncoder, encoder_factory
from ivl_lightning.data.index import build_indexes
from ivl_lightning.structures import Record, SampleCost
from tests import tiny

WORDS = np.array(
    ["alpha", "house", "the", "of", "running", "quickly", "image", "number", "blue", "42", "market", "tree"]
)


def conversation(rng: np.random.Generator, question: int, answer: int, prefix: str = "") -> list[dict[str, str]]:
    turns = [" ".join(rng.choice(WORDS, size)) for size in (question, answer)]
    return [{"from": "human", "value": prefix + turns[0]}, {"from": "gpt", "value": turns[1]}]


def write_rows(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"root": ".", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": 1}
    (folder / f"{name}.json").write_text(json.dumps({name: entry}))


def encoder_of(meta: Path) -> RowEncoder:
    tokenizer = tiny.load_tiny_tokenizer()
    factory = encoder_factory(DataConfig(meta=""), tokenizer, template="internvl2_5", tile_tokens=256, training=True)
    return factory(read_meta(meta)[0])


def bench_measuring(folder: Path, count: int) -> None:
    """Rows of about 60 words; JPEG files of 640x480, each named by 20 rows."""
    rng = np.random.default_rng(0)
    for number in range(count // 20):
        Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    write_rows(folder, "text", [{"conversations": conversation(rng, 20, 40)} for _ in range(count)])
    images = [
        {"image": f"{number % (count // 20)}.jpg", "conversations": conversation(rng, 15, 40, "<image>\n")}
        for number in range(count)
    ]
    write_rows(folder, "images", images)
    for name in ("text", "images"):
        encoder = encoder_of(folder / f"{name}.json")
        start = time.process_time()
        (index,) = build_indexes([encoder], workers=1, progress=False)
        rate = count / (time.process_time() - start)
        tokens = index.columns["tokens"].mean()
        print(f"| index, {name} rows of {tokens:,.0f} tokens, one process | {rate:,.0f} rows/s |")


class ConstantEncoder(RowEncoder):
    """Measures nothing: sizes follow from the line's number."""

    def measure(self, record: Record) -> SampleCost:
        return SampleCost(100 + record.line * 7919 % 4000, 50, (record.line * 31 % 13,))


def write_many(folder: Path, rows: int) -> Path:
    """Lines of about 400 bytes."""
    text = "lorem ipsum dolor sit amet " * 10
    with (folder / "many.jsonl").open("w") as file:
        for number in range(rows):
            file.write(
                f'{{"id": {number}, "conversations": [{{"from": "human", "value": "{number} {text}"}}, '
                f'{{"from": "gpt", "value": "{number}"}}]}}\n'
            )
    entry = {"root": ".", "annotation": "many.jsonl", "data_augment": False, "repeat_time": 1}
    (folder / "many.json").write_text(json.dumps({"many": entry}))
    return folder / "many.json"


def data_module(meta: Path, cache: Path) -> DynamicPackingDataModule:
    config = DataConfig(meta=str(meta), cache_dir=str(cache), packs_per_step=8, pool_size=512, num_workers=0)
    return DynamicPackingDataModule(config, tiny.load_tiny_tokenizer())


def first_run(folder: Path, meta: Path) -> None:
    """Make the index where the data module looks for it."""
    encoder = data_module(meta, folder / "cache")._encoder(training=True)(read_meta(meta)[0])
    encoder.__class__ = ConstantEncoder
    start = time.monotonic()
    (index,) = build_indexes([encoder], cache_dir=folder / "cache", progress=False)
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"| first pass over {len(index):,} rows, all cores, nothing measured | {seconds:.0f} s, peak {peak:.2f} GB |")


def second_run(folder: Path, meta: Path) -> None:
    """From the first line behind the imports to the first planned pack."""
    start = time.monotonic()
    data = data_module(meta, folder / "cache")
    data.prepare_data()
    data.setup("fit")
    first = next(iter(data.train_dataloader().sampler))
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rows = len(data.train_corpus or ())
    assert first.pack.samples
    print(f"| start of a second run over {rows:,} rows, to the first pack | {seconds:.1f} s, peak {peak:.2f} GB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=int, default=2000, help="rows that are really measured, of each kind")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large dataset")
    arguments = parser.parse_args()
    print("| what | value |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_measuring(folder, arguments.measured)
        meta = write_many(folder, arguments.rows)
        for run in (first_run, second_run):
            # A process of its own, so that memory is its own too.
            process = multiprocessing.get_context("spawn").Process(target=run, args=(folder, meta))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
