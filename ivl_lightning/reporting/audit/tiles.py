"""The tiles of a row in the shape of their grid, as small pictures for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ivl_lightning.data.annotations import media_of
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.tiling import choose_grid
from ivl_lightning.reporting.audit.headers import tile_limit
from ivl_lightning.structures import Record

SHOWN_SIDE = 168
"""Pixels of a tile on the page: legible, and a page of many tiles stays small."""
_QUALITY = 88


@dataclass(frozen=True, slots=True)
class ShownImage:
    """A picture, or the frames of a video, as the model gets it.

    Attributes:
        name: its path in the row.
        note: grid and size.
        cols: tiles side by side.
        tiles: data URIs of the grid's tiles, row by row.
        thumbnail: data URI of the whole picture as the last tile; None where there is none.
        frames: whether the tiles are frames.
    """

    name: str
    note: str
    cols: int
    tiles: list[str]
    thumbnail: str | None
    frames: bool = False


def shown_images(encoder: RowEncoder, record: Record, pixels: Tensor | None) -> list[ShownImage]:
    """The pictures of an encoded row.

    Args:
        encoder: of its dataset.
        record: the row.
        pixels: uint8 tiles `[N, 3, S, S]` of the whole row.
    """
    if pixels is None:
        return []
    media = media_of(record.row)
    if media.kind == "video":
        return [_frames(media.video or "", pixels)]
    counts = encoder.measure(record).tiles
    sizes = [encoder.reader.image_size(path) for path in media.images]
    grids = _grids(encoder, sizes, counts)
    shown, start = [], 0
    for path, size, grid, count in zip(media.images, sizes, grids, counts, strict=True):
        shown.append(_picture(path, size, grid, pixels[start : start + count]))
        start += count
    return shown


def _frames(path: str, pixels: Tensor) -> ShownImage:
    note = f"{len(pixels)} frames, one tile each: the most that it may get"
    return ShownImage(path, note, min(len(pixels), 8), [data_uri(tile) for tile in pixels], None, frames=True)


def _picture(path: str, size: tuple[int, int], grid: tuple[int, int], pixels: Tensor) -> ShownImage:
    cols, rows = grid
    tiles = [data_uri(tile) for tile in pixels]
    thumbnail = tiles.pop() if len(tiles) > cols * rows else None
    note = f"{size[0]} x {size[1]} pixels, grid {cols} x {rows}{' and thumbnail' if thumbnail else ''}"
    return ShownImage(path, note, cols, tiles, thumbnail)


def _grids(encoder: RowEncoder, sizes: Sequence[tuple[int, int]], counts: Sequence[int]) -> list[tuple[int, int]]:
    """The grids whose tiles were counted: those of the row's limit, or of the lower one it was shrunk to."""
    settings = encoder.settings
    for max_tiles in range(tile_limit(encoder, len(sizes)), 0, -1):
        least = min(settings.min_tiles, max_tiles)
        grids = [
            choose_grid(*size, min_tiles=least, max_tiles=max_tiles, tile_size=settings.tile_size) for size in sizes
        ]
        if [_tiles(grid, settings.use_thumbnail) for grid in grids] == list(counts):
            return grids
    raise AssertionError(f"no limit gives {list(counts)} tiles to pictures of {list(sizes)}")


def _tiles(grid: tuple[int, int], use_thumbnail: bool) -> int:
    count = grid[0] * grid[1]
    return count + 1 if use_thumbnail and count > 1 else count


def data_uri(tile: Tensor) -> str:
    """A tile as an embedded picture: as it is where it is small, else shrunk.

    Args:
        tile: uint8 `[3, S, S]`.
    """
    image = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())
    kind, options = "png", {}
    if max(image.size) > SHOWN_SIDE:
        image = image.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        kind, options = "jpeg", {"quality": _QUALITY, "subsampling": 0}
    drawing = io.BytesIO()
    image.save(drawing, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(drawing.getvalue()).decode()}"
