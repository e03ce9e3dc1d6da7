"""What the data path costs, as ratios measured side by side in one run: `make bench`.

Seconds differ between machines and hours; a ratio of two things timed in turn on the same machine differs less. Each
pair is timed several times in alternation, and the fastest of each counts.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.data.tiling import cut_tiles

ROUNDS = 5
NUM_SAMPLES = 20_000
MAX_TOKENS, MAX_TILES = 16_384, 48


def fastest(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the fastest of several runs of each, run in alternation."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for number, function in enumerate((first, second)):
            start = time.perf_counter()
            function()
            best[number] = min(best[number], time.perf_counter() - start)
    return best[0], best[1]


def samples() -> tuple[list[int], list[int]]:
    """Tokens and tiles of made-up samples: a third text, the rest pictures of 1 to 13 tiles."""
    rng = np.random.default_rng(0)
    tiles = np.where(rng.random(NUM_SAMPLES) < 1 / 3, 0, rng.integers(1, 14, NUM_SAMPLES))
    tokens = np.minimum(tiles * 256 + rng.integers(20, 1500, NUM_SAMPLES), MAX_TOKENS)
    return tokens.tolist(), tiles.tolist()


def bench_packing() -> None:
    """A pool of 64 samples against one of 8: what a better fill costs."""
    tokens, tiles = samples()

    def packs(pool_size: int) -> int:
        return sum(1 for _ in PackPlanner(MAX_TOKENS, MAX_TILES, pool_size=pool_size).plan(tokens, tiles))

    large, small = fastest(lambda: packs(64), lambda: packs(8))
    for pool_size in (64, 8):
        print(f"packing  pool of {pool_size}: {fill(packs(pool_size), tokens):.1%} of the tokens filled")
    print(f"packing  time with a pool of 64 / of 8: {large / small:.2f}")
    print(f"packing  {large / NUM_SAMPLES * 1e6:.1f} us per sample on this machine")


def fill(num_packs: int, tokens: list[int]) -> float:
    """Share of the packs' room that is used."""
    return sum(tokens) / (num_packs * MAX_TOKENS)


def bench_tiling() -> None:
    """Cutting a picture, against decoding it and against resizing it alone."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((1600, 1200))
    buffer = io.BytesIO()
    noise.save(buffer, format="JPEG", quality=90)

    def decode() -> None:
        with Image.open(io.BytesIO(buffer.getvalue())) as image:
            image.load()

    cut, decoded = fastest(lambda: cut_tiles(noise), decode)
    _, resized = fastest(decode, lambda: (noise.resize((4 * 448, 3 * 448)), noise.resize((448, 448))))
    print(f"tiling   1600 x 1200 into {len(cut_tiles(noise))} tiles: time of cutting / decoding: {cut / decoded:.2f}")
    print(f"tiling   time of cutting / of the two resizes in it: {cut / resized:.2f}")


if __name__ == "__main__":
    bench_packing()
    bench_tiling()
