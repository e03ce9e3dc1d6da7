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
    for row, (tile, quality) in enumerate(zip(tiles.contiguous().numpy(), qualities, strict=True)):
        for channel, plane in enumerate(_through_jpeg(tile, int(quality))):
            degraded[row, channel] = plane
    return torch.from_numpy(degraded)


def _through_jpeg(tile: np.ndarray, quality: int) -> list[np.ndarray]:
    """`[3, S, S]` in, three planes `[S, S]` out."""
    height, width = tile.shape[1:]
    buffer = BytesIO()
    # Three gray images lie on the planes as they are. Pillow joins and parts the channels faster than numpy does.
    planes = [Image.frombuffer("L", (width, height), plane, "raw", "L", 0, 1) for plane in tile]
    Image.merge("RGB", planes).save(buffer, format="JPEG", quality=quality)
    # Named, the format is not searched for.
    with Image.open(buffer, formats=["JPEG"]) as image:
        parted = [image.tobytes("raw", band) for band in "RGB"]
    return [np.frombuffer(plane, dtype=np.uint8).reshape(height, width) for plane in parted]
