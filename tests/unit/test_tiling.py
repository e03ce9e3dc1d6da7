"""Grids by the official rule, tiles bitwise as the original's, normalization as its transform."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl_lightning.constants import IMAGENET_MEAN, IMAGENET_STD
from ivl_lightning.data.tiling import choose_grid, count_tiles, cut_tiles, normalize_tiles, tile_budget

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tiling"
PIXELS = json.loads((FIXTURES / "pixels.json").read_text())
TILINGS = [
    pytest.param(entry, tiling, id=f"{entry['file']}-{number}")
    for entry in PIXELS["images"]
    for number, tiling in enumerate(entry["tilings"])
]
LEVELS = 2.0
"""Difference of mean allowed where Pillow or libjpeg are not those of the recording."""


def grid_cases() -> list[dict[str, Any]]:
    recorded = json.loads((FIXTURES / "cases.json").read_text())
    return [dict(zip(recorded["columns"], case, strict=True)) for case in recorded["cases"]]


def open_rgb(name: str) -> Image.Image:
    with Image.open(FIXTURES / "images" / name) as image:
        return image.convert("RGB")


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def channels_last(tiles: torch.Tensor) -> np.ndarray:
    return tiles.permute(0, 2, 3, 1).numpy()


def is_exact(entry: dict[str, Any]) -> bool:
    """Hashes hold for the recorded Pillow and the recorded decoded bytes only."""
    return PIL.__version__ == PIXELS["pillow"] and sha256(np.asarray(open_rgb(entry["file"]))) == entry["rgb_sha256"]


def limits(tiling: dict[str, Any]) -> dict[str, Any]:
    return {
        "min_tiles": tiling["min_tiles"],
        "max_tiles": tiling["max_tiles"],
        "tile_size": tiling["image_size"],
        "use_thumbnail": tiling["use_thumbnail"],
    }


def test_all_recorded_grids() -> None:
    """400 grids of the original, ties included, the four that hang on the order of a set too."""
    for case in grid_cases():
        size = (case["width"], case["height"])
        arguments = limits(case)
        assert count_tiles(*size, **arguments) == case["num_tiles"], case
        arguments.pop("use_thumbnail")
        assert choose_grid(*size, **arguments) == (case["cols"], case["rows"]), case


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((633, 633), 12, (1, 1)),
        ((634, 634), 12, (2, 2)),
        ((600, 449), 12, (4, 3)),
        ((1920, 1080), 24, (5, 3)),
        ((2480, 3508), 36, (5, 7)),
    ],
)
def test_known_grids(size: tuple[int, int], max_tiles: int, grid: tuple[int, int]) -> None:
    """634^2 exceeds 0.5 * 448^2 * 4 and 633^2 does not; no other rule limits how far an image is enlarged."""
    assert choose_grid(*size, max_tiles=max_tiles) == grid


def naive_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """The nearest grids by rising count; the last of them that the image fills by half, else the first."""
    everything = [(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles + 1)]
    grids = [grid for grid in everything if min_tiles <= grid[0] * grid[1] <= max_tiles]
    distances = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    nearest = [grid for grid in grids if distances[grid] == min(distances.values())]
    nearest.sort(key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - grid[1]), grid[0]))
    filled = [grid for grid in nearest[1:] if width * height > tile_size**2 * grid[0] * grid[1] / 2]
    return filled[-1] if filled else nearest[0]


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 12), st.integers(0, 28), st.sampled_from([14, 224, 448])
)
def test_grid_equals_the_rule(width: int, height: int, min_tiles: int, more: int, tile_size: int) -> None:
    """The scan equals the rule written out over all candidates."""
    chosen = choose_grid(width, height, min_tiles=min_tiles, max_tiles=min_tiles + more, tile_size=tile_size)
    assert chosen == naive_grid(width, height, min_tiles, min_tiles + more, tile_size)


SIDE = st.integers(1, 6)


@given(SIDE, SIDE, SIDE, SIDE, st.integers(1, 300), st.integers(1, 12), st.integers(0, 28))
def test_grid_equals_the_rule_on_ties(a: int, b: int, c: int, d: int, scale: int, min_tiles: int, more: int) -> None:
    """An image halfway between the ratios a/b and c/d, (ad + cb) / 2bd, is equally near to both grids."""
    width, height = scale * (a * d + c * b), scale * 2 * b * d
    chosen = choose_grid(width, height, min_tiles=min_tiles, max_tiles=min_tiles + more)
    assert chosen == naive_grid(width, height, min_tiles, min_tiles + more, 448)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"min_tiles": 0}, "min_tiles is 0"),
        ({"min_tiles": 7, "max_tiles": 6}, "max_tiles is 6"),
        ({"tile_size": 0}, "tile_size is 0"),
    ],
)
def test_impossible_limits_are_named(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        choose_grid(10, 10, **arguments)


def test_image_without_pixels_has_no_grid() -> None:
    with pytest.raises(ValueError, match="0 x 10"):
        choose_grid(0, 10)


@pytest.mark.parametrize(("max_tiles", "images", "budget"), [(12, 1, 12), (12, 5, 2), (6, 7, 1), (1, 1, 1)])
def test_tile_budget(max_tiles: int, images: int, budget: int) -> None:
    """max(1, max_tiles // num_images)."""
    assert tile_budget(max_tiles, images) == budget


def test_tile_budget_of_no_image() -> None:
    with pytest.raises(ValueError, match="num_images is 0"):
        tile_budget(12, 0)


@pytest.mark.parametrize(("entry", "tiling"), TILINGS)
def test_tiles_equal_the_original(entry: dict[str, Any], tiling: dict[str, Any]) -> None:
    """Every mode, tiled straight from the file: bitwise, or within a tolerance under another Pillow."""
    with Image.open(FIXTURES / "images" / entry["file"]) as image:
        tiles = channels_last(cut_tiles(image, **limits(tiling)))
    assert list(tiles.shape) == tiling["shape"]
    if is_exact(entry):
        assert sha256(tiles) == tiling["sha256"]
    else:
        assert tiles.mean(axis=(1, 2, 3)) == pytest.approx(tiling["tile_mean"], abs=LEVELS)


@pytest.mark.parametrize("name", ["rgb_landscape.png", "rgb_portrait.png"])
def test_tiles_of_another_pillow_stay_near(name: str) -> None:
    """The order of the two resize passes moves pixels by a few levels only."""
    with np.load(FIXTURES / "tiles_56.npz") as recorded:
        expected = recorded[name].astype(int)
    tiles = channels_last(cut_tiles(open_rgb(name), tile_size=56)).astype(int)
    assert np.abs(tiles - expected).mean() < LEVELS


def test_tiles_are_contiguous_uint8_without_sharing_the_image() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    tiles = cut_tiles(image, tile_size=8)
    tiles.zero_()
    assert tiles.dtype == torch.uint8
    assert tiles.is_contiguous()
    assert image.getpixel((0, 0)) == (1, 2, 3)


def test_tiles_run_row_by_row_and_the_thumbnail_is_last() -> None:
    """A 2 x 2 grid of plain colors comes out left to right, top to bottom."""
    image = Image.new("RGB", (16, 16))
    for number, corner in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        image.paste((number, number, number), (*corner, corner[0] + 8, corner[1] + 8))
    tiles = cut_tiles(image, min_tiles=4, max_tiles=4, tile_size=8)
    assert [int(tile.unique()) for tile in tiles[:4]] == [0, 1, 2, 3]
    assert torch.equal(tiles[4], torch.from_numpy(np.asarray(image.resize((8, 8))).copy()).permute(2, 0, 1))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 6), st.booleans())
def test_count_from_the_header_equals_the_cut(width: int, height: int, max_tiles: int, use_thumbnail: bool) -> None:
    """What the plan counts is what a worker cuts."""
    tiles = cut_tiles(Image.new("L", (width, height)), max_tiles=max_tiles, tile_size=8, use_thumbnail=use_thumbnail)
    counted = count_tiles(width, height, max_tiles=max_tiles, tile_size=8, use_thumbnail=use_thumbnail)
    assert tiles.shape == (counted, 3, 8, 8)


@pytest.mark.parametrize(("entry", "tiling"), TILINGS[::3])
def test_normalized_sums_equal_the_original(entry: dict[str, Any], tiling: dict[str, Any]) -> None:
    """Sum and absolute sum over the evaluation transform's output."""
    if not is_exact(entry):
        pytest.skip("recorded under another Pillow or libjpeg")
    values = normalize_tiles(cut_tiles(open_rgb(entry["file"]), **limits(tiling))).double()
    assert values.sum().item() == pytest.approx(tiling["normalized_sum"], rel=1e-5, abs=1.0)
    assert values.abs().sum().item() == pytest.approx(tiling["normalized_abs_sum"], rel=1e-6)


def test_normalization_by_hand() -> None:
    """(x / 255 - mean) / std for all 256 levels, against float64."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (levels.double() / 255 - mean) / std
    torch.testing.assert_close(normalize_tiles(levels).double(), expected, rtol=0, atol=1e-6)


def test_normalization_rounds_once() -> None:
    """bfloat16 values are the float32 values rounded, not a bfloat16 calculation."""
    tiles = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    assert torch.equal(normalize_tiles(tiles, torch.bfloat16), normalize_tiles(tiles).to(torch.bfloat16))
    assert normalize_tiles(tiles[:0]).shape == (0, 3, 8, 8)


def test_normalizing_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        normalize_tiles(torch.zeros(1, 3, 8, 8))


def binary_noise(width: int, height: int) -> Image.Image:
    """The hardest picture for a filter: each value black or white."""
    values = np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values * 255)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1920, 1080), (700, 1500), (449, 448), (1, 1), (3, 900)])
def test_fast_resize_stays_within_two_levels(size: tuple[int, int]) -> None:
    image = binary_noise(*size)
    exact, fast = cut_tiles(image), cut_tiles(image, resize="fast")
    assert fast.dtype == torch.uint8
    assert fast.is_contiguous()
    assert fast.shape == exact.shape
    assert (exact.int() - fast.int()).abs().max() <= 2


@pytest.mark.parametrize("size", [(480, 640), (300, 900), (620, 877), (1080, 1920)])
def test_fast_thumbnail_of_a_tall_image_is_exact(size: tuple[int, int]) -> None:
    """Pillow shrinks these columns first; torch, which cannot, would be off by dozens of levels."""
    image = binary_noise(*size)
    assert torch.equal(cut_tiles(image)[-1], cut_tiles(image, resize="fast")[-1])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 6))
def test_fast_resize_of_any_size(width: int, height: int, max_tiles: int) -> None:
    image = binary_noise(width, height)
    exact, fast = (cut_tiles(image, max_tiles=max_tiles, tile_size=56, resize=mode) for mode in ("exact", "fast"))
    assert (exact.int() - fast.int()).abs().max() <= 2


def test_unknown_resize_is_named() -> None:
    with pytest.raises(ValueError, match="resize is 'quick'; choose 'exact'"):
        cut_tiles(binary_noise(8, 8), resize="quick")
