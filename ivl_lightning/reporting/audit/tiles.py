"""The tiles of a row in the shape of their grid, as small pictures for the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.picture_tiles import PictureTiles, picture_tiles, tile_image
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
    return [_shown(picture) for picture in picture_tiles(encoder, record, pixels)]


def _shown(picture: PictureTiles) -> ShownImage:
    tiles = [data_uri(tile) for tile in picture.tiles]
    thumbnail = tiles.pop() if picture.thumbnail else None
    frames = picture.size is None
    note = f"{picture.note}: the most that it may get" if frames else picture.note
    return ShownImage(picture.name, note, picture.cols, tiles, thumbnail, frames)


def data_uri(tile: Tensor) -> str:
    """A tile as an embedded picture: as it is where it is small, else shrunk.

    Args:
        tile: uint8 `[3, S, S]`.
    """
    image = tile_image(tile)
    kind, options = "png", {}
    if max(image.size) > SHOWN_SIDE:
        image = image.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        kind, options = "jpeg", {"quality": _QUALITY, "subsampling": 0}
    drawing = io.BytesIO()
    image.save(drawing, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(drawing.getvalue()).decode()}"
