"""The tiles of an encoded row picture by picture, in the shape of their grids: what people look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ivl_lightning.data.annotations import media_of
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.tiling import choose_grid
from ivl_lightning.structures import Record

FRAME_COLUMNS = 8
"""Frames of a video side by side."""


@dataclass(frozen=True, slots=True)
class PictureTiles:
    """A picture, or the frames of a video, as the model gets it.

    Attributes:
        name: its path in the row.
        size: width and height in pixels; None of a video.
        cols, rows: of the grid.
        thumbnail: whether the last tile, behind those of the grid, is the whole picture.
        tiles: uint8 `[n, 3, S, S]`, row by row.
    """

    name: str
    size: tuple[int, int] | None
    cols: int
    rows: int
    thumbnail: bool
    tiles: Tensor

    @property
    def note(self) -> str:
        """Grid and size, for people."""
        if self.size is None:
            return f"{len(self.tiles)} frames, one tile each"
        thumbnail = " and thumbnail" if self.thumbnail else ""
        return f"{self.size[0]} x {self.size[1]} pixels, grid {self.cols} x {self.rows}{thumbnail}"


def picture_tiles(encoder: RowEncoder, record: Record, pixels: Tensor | None) -> list[PictureTiles]:
    """The pictures of an encoded row.

    Args:
        encoder: of its dataset.
        record: the row.
        pixels: uint8 tiles `[N, 3, S, S]` of the whole row; None for text.
    """
    if pixels is None:
        return []
    media = media_of(record.row)
    if media.kind == "video":
        cols = min(len(pixels), FRAME_COLUMNS)
        return [PictureTiles(media.video or "", None, cols, math.ceil(len(pixels) / cols), False, pixels)]
    sizes = [encoder.reader.image_size(path) for path in media.images]
    shown, start = [], 0
    for path, size, (cols, rows) in zip(media.images, sizes, _grids(encoder, sizes, len(pixels)), strict=True):
        count = _count((cols, rows), encoder.settings.use_thumbnail)
        tiles = pixels[start : start + count]
        shown.append(PictureTiles(path, size, cols, rows, count > cols * rows, tiles))
        start += count
    return shown


def _grids(encoder: RowEncoder, sizes: Sequence[tuple[int, int]], total: int) -> list[tuple[int, int]]:
    """The grids that make so many tiles: those of the row's limit, or of the lower one it was shrunk to.

    A higher limit with as many tiles would have fitted too, so the first that is found is the one that was taken.
    """
    settings = encoder.settings
    for max_tiles in range(encoder.tile_limit(len(sizes)), 0, -1):
        least = min(settings.min_tiles, max_tiles)
        grids = [
            choose_grid(*size, min_tiles=least, max_tiles=max_tiles, tile_size=settings.tile_size) for size in sizes
        ]
        if sum(_count(grid, settings.use_thumbnail) for grid in grids) == total:
            return grids
    raise AssertionError(f"no limit gives {total} tiles to pictures of {list(sizes)}")


def _count(grid: tuple[int, int], use_thumbnail: bool) -> int:
    count = grid[0] * grid[1]
    return count + 1 if use_thumbnail and count > 1 else count


def tile_image(tile: Tensor) -> Image.Image:
    """A tile as a picture.

    Args:
        tile: uint8 `[3, S, S]`.
    """
    return Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())
