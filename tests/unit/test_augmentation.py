"""JPEG degradation: one quality per tile from 75 to 100, decided by the generator alone."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from ivl_lightning.data.augmentation import degrade_jpeg, sample_rng


def pictures(count: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, size=(count, 3, 8, 8), dtype=np.uint8)
    return torch.from_numpy(coarse.repeat(4, axis=2).repeat(4, axis=3))


def compressed(tile: torch.Tensor, quality: int) -> torch.Tensor:
    """Pillow's JPEG with its default chroma subsampling, as the original calls it."""
    buffer = BytesIO()
    Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(buffer).convert("RGB")).copy()).permute(2, 0, 1)


def test_each_tile_has_a_quality_of_its_own() -> None:
    """Tile i is compressed with the i-th draw from uniform 75..100."""
    tiles = pictures(5)
    qualities = sample_rng(1, 2, 3).integers(75, 101, size=5)
    degraded = degrade_jpeg(tiles, sample_rng(1, 2, 3))
    assert torch.equal(degraded, torch.stack([compressed(t, int(q)) for t, q in zip(tiles, qualities, strict=True)]))


def test_qualities_reach_both_ends() -> None:
    """All of the 26 qualities are drawn, none beside them."""
    tile = pictures(1)
    reached = {quality: compressed(tile[0], quality) for quality in range(75, 101)}
    degraded = degrade_jpeg(tile.expand(400, -1, -1, -1), sample_rng(0, 0, 0))
    for quality in (75, 100):
        assert any(torch.equal(reached[quality], one) for one in degraded)
    assert all(any(torch.equal(one, expected) for expected in reached.values()) for one in degraded)


def test_same_place_same_pixels() -> None:
    """(seed, epoch, sample) decides; a worker's global state does not."""
    tiles = pictures(3)
    first = degrade_jpeg(tiles, sample_rng(7, 0, 5))
    torch.manual_seed(123)
    assert torch.equal(first, degrade_jpeg(tiles, sample_rng(7, 0, 5)))


@pytest.mark.parametrize("other", [(8, 0, 5), (7, 1, 5), (7, 0, 6), (5, 0, 7)])
def test_other_place_other_draws(other: tuple[int, int, int]) -> None:
    assert sample_rng(7, 0, 5).random() != sample_rng(*other).random()


def test_input_stays_and_no_tile_is_no_tile() -> None:
    tiles = pictures(2)
    before = tiles.clone()
    assert degrade_jpeg(tiles, sample_rng(0, 0, 0)).shape == tiles.shape
    assert torch.equal(tiles, before)
    assert degrade_jpeg(tiles[:0], sample_rng(0, 0, 0)).shape == (0, 3, 32, 32)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="float32"):
        degrade_jpeg(torch.zeros(1, 3, 8, 8), sample_rng(0, 0, 0))
    with pytest.raises(ValueError, match="epoch -1"):
        sample_rng(0, -1, 0)
