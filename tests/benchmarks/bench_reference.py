"""The cache of reference log-probabilities: what a second run saves, and how exact cached ones are: `make bench`.

Asked in other packs, or as whole conversations, the reference model rounds otherwise; how much is measured in float32
and in bfloat16.
"""

from __future__ import annotations

import argparse
import io
import logging
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import lightning as L
import numpy as np
import torch
from preference_shapes import SMALL, build, random_pair, shapes

from ivl_lightning.config.schema import OptimConfig
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.stages.mixed_preference import MixedPreference
from ivl_lightning.stages.root import InternVLWithLogps
from tests import tiny


class Started(L.Callback):
    """Notes when training begins."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at = time.process_time()


def fit(folder: Path, cache: str, dtype: str) -> tuple[float, PreferenceDataModule]:
    """Seconds of CPU until training begins, and the data module with its cache open."""
    tokenizer = tiny.load_tiny_tokenizer()
    meta = folder / "data/pairs.json"
    config = tiny.tiny_data_config(
        meta, max_tokens=1200, batch_pairs=6, packs_per_step=2, val_rows=5, cache_dir=str(folder / cache)
    )
    data = PreferenceDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    stage = MixedPreference(
        lambda: tiny.build_tiny_model(tokenizer, dtype=dtype), optim=OptimConfig(lr=1e-3), generation_tokens=3
    )
    started = Started()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[started],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    start = time.process_time()
    with redirect_stdout(io.StringIO()):
        trainer.fit(stage, data)
    return started.at - start, data


def cached_against_packs(data: PreferenceDataModule, dtype: str) -> float:
    """Largest difference of the cache's log-probabilities from those in training packs, which are other ones."""
    root = InternVLWithLogps(tiny.build_tiny_model(data.tokenizer, dtype=dtype)).eval()
    with torch.inference_mode():
        batches = [batch for batch in data.train_dataloader() if batch.num_pairs]
        return max(float((root(batch) - batch.reference_logps).abs().max()) for batch in batches)


def other_layouts(dtype: str) -> tuple[float, float, float]:
    """Largest difference of six pairs' log-probabilities in one pack from those of each alone, and from those of
    whole conversations, as the official trainer has them; and the size of the largest.
    """
    config, rng = shapes(SMALL), np.random.default_rng(2)
    pairs = [random_pair(config, rng, 1 + number % 2, 10, 40 + 30 * number, 200) for number in range(6)]
    root = InternVLWithLogps(build(config, "ivl_packed").to(getattr(torch, dtype))).eval()
    with torch.inference_mode():
        packed = root(tiny.pair_batch(pairs))
        alone = torch.cat([root(tiny.pair_batch([pair])) for pair in pairs])
        whole = root(tiny.pair_batch(pairs, shared_prefix=False))
    other, plain, size = (float(value.abs().max()) for value in (packed - alone, packed - whole, packed))
    return other, plain, size


def bench_cache(folder: Path, rows: int) -> None:
    """Start of a first and a second run, and what is lost by asking the reference model in other packs."""
    tiny.write_tiny_pairs(folder / "data", rows=rows)
    columns: list[tuple[float, ...]] = []
    for dtype in ("float32", "bfloat16"):
        # The first fit leaves the index behind for both.
        fit(folder, dtype, dtype)
        for path in (folder / dtype).glob("reference-*/*.parquet"):
            path.unlink()
        first, _ = fit(folder, dtype, dtype)
        second, data = fit(folder, dtype, dtype)
        columns.append((first, second, cached_against_packs(data, dtype), *other_layouts(dtype)))
    names = (
        f"start with the reference pass over {2 * rows} tiny pairs, s",
        "start of a second run, s",
        "tiny pairs: largest difference of cached log-probabilities from those in training packs",
        "shapes in use, six pairs in one pack: largest difference from each pair alone",
        "the same: from whole conversations, without a shared prefix",
        "the same: largest log-probability, of 200 tokens",
    )
    print("| cached reference | float32 | bfloat16 |\n|---|---|---|")
    for name, value, half in zip(names, *columns, strict=True):
        print(f"| {name} | {value:.2g} | {half:.2g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100, help="pairs of each of two kinds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as name:
        bench_cache(Path(name), arguments.rows)


if __name__ == "__main__":
    main()
