"""Which grid an image is cut into, its tiles and its thumbnail.

The rules are those of InternVL's `dynamic_preprocess` and `find_closest_aspect_ratio`; the pixels are Pillow's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from ivl_lightning.constants import IMAGENET_MEAN, IMAGENET_STD, TILE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor

    from ivl_lightning.config.schema import Resize


@lru_cache(maxsize=256)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All `(cols, rows)` with `min_tiles <= cols * rows <= max_tiles`, in the order they are tried."""
    grids = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
        if cols * rows >= min_tiles
    ]
    # The original sorts a Python set by tile count alone, so grids of equal count come in hash order. Elongated
    # before square and tall before wide is a fixed order that agrees with CPython wherever that was recorded.
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - grid[1]), grid[0])))


def _check_limits(min_tiles: int, max_tiles: int, tile_size: int) -> None:
    if tile_size < 1:
        raise ValueError(f"tile_size is {tile_size}; a tile needs a side of at least 1 pixel")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"min_tiles is {min_tiles} and max_tiles is {max_tiles}; choose 1 <= min_tiles <= max_tiles "
            "(data.min_tiles, data.max_tiles, or the dataset's max_dynamic_patch)"
        )


def choose_grid(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = TILE_SIZE
) -> tuple[int, int]:
    """Choose the grid whose aspect ratio is nearest to the image's.

    Grids are tried by rising tile count and a strictly nearer one wins. On an exact tie the later grid, which has
    the more tiles, wins if the image has more than half of that grid's pixels. Where two grids of *equal* count tie
    (possible for `min_tiles > 1` only) the original depends on the order of a Python set; here the squarer, then the
    wider grid counts as the later one.

    Args:
        width: image width in pixels.
        height: image height in pixels.
        min_tiles: fewest tiles of a grid.
        max_tiles: most tiles of a grid; the thumbnail is not counted.
        tile_size: side of a tile in pixels.

    Returns:
        `(cols, rows)`.

    Raises:
        ValueError: a side below 1, or limits that allow no grid.
    """
    _check_limits(min_tiles, max_tiles, tile_size)
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no grid; both sides must be at least 1")
    ratio = width / height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in _grids(min_tiles, max_tiles):
        distance = abs(ratio - cols / rows)
        fills_half = width * height > 0.5 * tile_size * tile_size * cols * rows
        if distance < best_distance or (distance == best_distance and fills_half):
            best, best_distance = (cols, rows), distance
    return best


def count_tiles(
    width: int,
    height: int,
    *,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile_size: int = TILE_SIZE,
    use_thumbnail: bool = True,
) -> int:
    """Number of tiles `cut_tiles` returns, from the image size alone.

    Args:
        width: image width in pixels.
        height: image height in pixels.
        min_tiles: fewest tiles of a grid.
        max_tiles: most tiles of a grid.
        tile_size: side of a tile in pixels.
        use_thumbnail: whether a grid of several tiles is followed by the whole image as one more tile.

    Returns:
        Tiles including the thumbnail, so up to `max_tiles + 1`.

    Raises:
        ValueError: as `choose_grid`.
    """
    cols, rows = choose_grid(width, height, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size)
    return _with_thumbnail(cols * rows, use_thumbnail)


def _with_thumbnail(grid_tiles: int, use_thumbnail: bool) -> int:
    return grid_tiles + 1 if use_thumbnail and grid_tiles > 1 else grid_tiles


def tile_budget(max_tiles: int, num_images: int) -> int:
    """Most grid tiles of each image of a sample: `max(1, max_tiles // num_images)`.

    Args:
        max_tiles: limit for a single image.
        num_images: images that share it.

    Raises:
        ValueError: an argument below 1.
    """
    if max_tiles < 1 or num_images < 1:
        raise ValueError(f"max_tiles is {max_tiles} and num_images is {num_images}; both must be at least 1")
    return max(1, max_tiles // num_images)


def cut_tiles(
    image: Image,
    *,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile_size: int = TILE_SIZE,
    use_thumbnail: bool = True,
    resize: Resize = "exact",
) -> Tensor:
    """Resize an image to its grid and cut it, bitwise as the original before normalization.

    The whole image is resized to the grid by Pillow's bicubic filter without keeping its aspect ratio and cut row by
    row; the thumbnail, made from the image itself, comes last. `convert("RGB")` drops alpha and clips 16-bit gray
    as the original does; remedies are switches of `MediaReader`.

    Args:
        image: an image of any mode.
        min_tiles: fewest tiles of a grid.
        max_tiles: most tiles of a grid.
        tile_size: side S of a tile in pixels.
        use_thumbnail: whether a grid of several tiles is followed by the whole image as one more tile.
        resize: `exact` is Pillow's filter; `fast` is torch's with the same kernel and coarser weights, a few times
            faster and at most 2 of 255 levels off.

    Returns:
        uint8 `[N, 3, S, S]`, contiguous.

    Raises:
        ValueError: as `choose_grid`, a mode that Pillow cannot convert, or an unknown `resize`.
    """
    if resize not in ("exact", "fast"):
        raise ValueError(f"resize is {resize!r}; choose 'exact' (the original's pixels) or 'fast'")
    cols, rows = choose_grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    tiles = np.empty((_with_thumbnail(cols * rows, use_thumbnail), 3, tile_size, tile_size), dtype=np.uint8)
    pixels = _Pixels(rgb, resize)
    pixels.cut_into(tiles[: cols * rows], cols, rows)
    if len(tiles) > cols * rows:
        pixels.cut_into(tiles[-1:], 1, 1)
    return torch.from_numpy(tiles)


class _Pixels:
    """An RGB image that is resized to several sizes."""

    def __init__(self, image: Image, resize: Resize) -> None:
        self.image = image
        self.resize = resize
        self._tensor: Tensor | None = None

    def cut_into(self, tiles: np.ndarray, cols: int, rows: int) -> None:
        """Resize to a grid and write its tiles, row by row, into uint8 `[cols * rows, 3, S, S]`."""
        size = tiles.shape[-1]
        width, height = cols * size, rows * size
        grid = tiles.reshape(rows, cols, 3, size, size)
        if self.resize == "fast" and not _is_vertical_first(*self.image.size, width, height):
            grid[...] = self._by_torch(width, height).reshape(3, rows, size, cols, size).transpose(1, 3, 0, 2, 4)
            return
        # Pillow's default filter for RGB is bicubic, and the original relies on that default.
        resized = self.image.resize((width, height))
        for row in range(rows):
            # Pillow takes the channels apart faster than numpy does, and a strip at a time stays in the cache.
            strip = resized.crop((0, row * size, width, (row + 1) * size))
            for channel, band in enumerate("RGB"):
                plane = np.frombuffer(strip.tobytes("raw", band), dtype=np.uint8)
                grid[row, :, channel] = plane.reshape(size, cols, size).transpose(1, 0, 2)

    def _by_torch(self, width: int, height: int) -> np.ndarray:
        if self._tensor is None:
            self._tensor = torch.from_numpy(np.array(self.image)).permute(2, 0, 1).unsqueeze(0)
        resized = functional.interpolate(self._tensor, (height, width), mode="bicubic", antialias=True)
        planes: np.ndarray = resized[0].numpy()
        return planes


def _is_vertical_first(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Whether Pillow resizes columns before rows, which torch never does; the order shows in up to 30 levels.

    Found by trial with Pillow 13.0.0: it does so where that takes off more than twice as many rows as columns. Where
    another Pillow has another rule, the wide images that are left to torch are resized rows first all the same.
    """
    return height - new_height > 2 * max(0, width - new_width)


def normalize_tiles(
    tiles: Tensor,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """`(tiles / 255 - mean) / std` per channel, on the device the tiles are on.

    Computed in float32 and rounded once to `dtype`, so that float32 results equal the original's transform.

    Args:
        tiles: uint8 `[N, 3, S, S]`.
        dtype: floating type of the result.
        mean: one value per channel.
        std: one value per channel.

    Returns:
        `[N, 3, S, S]` of `dtype`.

    Raises:
        ValueError: tiles that are not uint8 `[N, 3, S, S]`, which would be scaled twice.
    """
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[1] != 3:
        raise ValueError(f"expected uint8 tiles [N, 3, S, S], got {tiles.dtype} {list(tiles.shape)}")
    # non_blocking: a few bytes from pageable memory are staged at once, and the device need not be waited for.
    center = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1).to(tiles.device, non_blocking=True)
    scale = torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1).to(tiles.device, non_blocking=True)
    return tiles.to(torch.float32).div_(255).sub_(center).div_(scale).to(dtype)
