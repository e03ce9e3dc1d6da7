"""A made-up stream of samples that resembles the InternVL 2.5 mixture: tokens and tiles of each, in arrival order.

30 % single pictures of common sizes (up to 12 tiles and a thumbnail), 10 % documents (24 or 36), 15 % several pictures
(24 shared among them), 10 % videos of 8 to 32 frames, 35 % text; text lengths are lognormal with mean 200. All draws
come from one generator in a fixed order, so a length and a seed name a stream bit for bit: 200,000 samples of seed 0
have 494,950,434 tokens and 1,733,073 tiles. 50,000 samples of seed 0 are the reference stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.tiling import count_tiles

MIXTURE = (0.30, 0.10, 0.15, 0.10, 0.35)
"""Shares of single pictures, documents, several pictures, videos and text."""
TILE_HEAVY = (0.35, 0.20, 0.20, 0.20, 0.05)
TEXT_HEAVY = (0.15, 0.05, 0.10, 0.05, 0.65)

TOKENS_PER_TILE, TOKENS_PER_IMAGE, TOKENS_PER_FRAME_LABEL, TEMPLATE_TOKENS = 256, 2, 6, 40
TEXT_MEAN, TEXT_SIGMA, TEXT_RANGE = 200, 1.1, (8, 4096)

PHOTO_SIZES = (
    (640, 480), (480, 640), (500, 375), (1024, 768), (1920, 1080), (1280, 720), (800, 600), (512, 512),
    (1024, 1024), (336, 336), (224, 224), (600, 400), (400, 600), (850, 400), (300, 900), (1080, 1920),
)  # fmt: skip
PAGE_SIZES = (
    (2480, 3508), (3508, 2480), (1654, 2339), (1240, 1754), (1700, 2200), (1536, 2048), (2000, 1000), (1000, 3000),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stream:
    """Samples in arrival order.

    Attributes:
        kinds: place in `MIXTURE` of each, `[n]`.
        tokens, tiles, images: of each, int64 `[n]`.
    """

    kinds: NDArray[np.int64]
    tokens: NDArray[np.int64]
    tiles: NDArray[np.int64]
    images: NDArray[np.int64]


def make_stream(num_samples: int, seed: int = 0, mixture: Sequence[float] = MIXTURE) -> Stream:
    """The stream of a seed; another length is another stream, not more of the same."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(mixture), size=num_samples, p=mixture)
    text = rng.lognormal(np.log(TEXT_MEAN) - TEXT_SIGMA**2 / 2, TEXT_SIGMA, num_samples)
    text = text.clip(*TEXT_RANGE).astype(np.int64) + TEMPLATE_TOKENS
    draws = (_single, _document, _several, _video, _text)
    drawn = np.array([draws[kind](rng) for kind in kinds], dtype=np.int64).reshape(-1, 3)
    images, tiles, labels = drawn.T
    tokens = TOKENS_PER_TILE * tiles + TOKENS_PER_IMAGE * images + text + labels
    return Stream(kinds, tokens, tiles, images)


@cache
def _tiles(width: int, height: int, max_tiles: int) -> int:
    return count_tiles(width, height, max_tiles=max_tiles)


def _single(rng: np.random.Generator) -> tuple[int, int, int]:
    """Images, tiles and tokens of frame labels of one picture; so do the functions below for their kind."""
    width, height = PHOTO_SIZES[rng.integers(len(PHOTO_SIZES))]
    scale, stretched = rng.uniform(0.7, 1.4), rng.uniform(0.7, 1.4)
    stretch = rng.choice([1, 1, stretched])
    return 1, _tiles(int(width * scale * stretch), int(height * scale), 12), 0


def _document(rng: np.random.Generator) -> tuple[int, int, int]:
    width, height = PAGE_SIZES[rng.integers(len(PAGE_SIZES))]
    scale, stretch = rng.uniform(0.6, 1.3), rng.uniform(0.9, 1.1)
    max_tiles = 24 if rng.random() < 0.5 else 36
    return 1, _tiles(int(width * scale * stretch), int(height * scale), max_tiles), 0


def _several(rng: np.random.Generator) -> tuple[int, int, int]:
    count = int(min(1 + rng.geometric(0.4), 12))
    tiles = 0
    for _ in range(count):
        width, height = PHOTO_SIZES[rng.integers(len(PHOTO_SIZES))]
        stretch = rng.uniform(0.8, 1.25)
        tiles += _tiles(int(width * stretch), height, max(1, 24 // count))
    return count, tiles, 0


def _video(rng: np.random.Generator) -> tuple[int, int, int]:
    frames = int(rng.integers(8, 33))
    return frames, frames, TOKENS_PER_FRAME_LABEL * frames


def _text(rng: np.random.Generator) -> tuple[int, int, int]:
    return 0, 0, 0
