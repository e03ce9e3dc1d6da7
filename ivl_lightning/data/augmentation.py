"""Random JPEG compression of tiles, the only augmentation of the InternVL recipes."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image

MIN_QUALITY = 75
MAX_QUALITY = 100
"""Bounds of the JPEG quality, both included (InternVL `build_transform`)."""


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Random numbers of one sample in one epoch, the same in whichever worker or rank it is read.

    Args:
        seed: seed of the run.
        epoch: epoch number.
        sample: row number of the sample.

    Raises:
        ValueError: a negative number.
    """
    if min(seed, epoch, sample) < 0:
        raise ValueError(f"seed {seed}, epoch {epoch}, sample {sample}: none may be negative")
    return np.random.default_rng((seed, epoch, sample))


def degrade_jpeg(tiles: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Compress and decode each tile as JPEG, with a quality of its own drawn uniformly from 75 to 100.

    As in the original the tiles are compressed after cropping, the thumbnail too, with Pillow's default chroma
    subsampling.

    Args:
        tiles: uint8 `[N, 3, S, S]`; left as it is.
        rng: the only source of randomness; one draw per tile.

    Returns:
        uint8 `[N, 3, S, S]`.

    Raises:
        ValueError: tiles that are not uint8 `[N, 3, S, S]`.
    """
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[1] != 3:
        raise ValueError(f"expected uint8 tiles [N, 3, S, S], got {tiles.dtype} {list(tiles.shape)}")
    qualities = rng.integers(MIN_QUALITY, MAX_QUALITY + 1, size=len(tiles))
    degraded = np.empty(tuple(tiles.shape), dtype=np.uint8)
    for row, (tile, quality) in enumerate(zip(tiles.numpy(), qualities, strict=True)):
        degraded[row] = _through_jpeg(tile.transpose(1, 2, 0), int(quality)).transpose(2, 0, 1)
    return torch.from_numpy(degraded)


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="JPEG", quality=quality)
    buffer.seek(0)
    with Image.open(buffer) as image:
        return np.asarray(image)
