"""The tiles of one picture side by side in one small picture, with gaps between them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ivl_lightning.data.picture_tiles import PictureTiles, tile_image

_LARGEST_TILE = 168
_LARGEST_GRID = 560
"""Pixels of the longer side of a grid, about."""
_SMALLEST_TILE = 56
_QUALITY = 85
_GAP, _WIDE_GAP = 2, 6
_BACKGROUND = (176, 180, 186)
"""Of the gaps: seen on a light and on a dark page."""


def contact_sheet(picture: PictureTiles) -> Image.Image:
    """The grid of a picture, and its thumbnail on the right; tiles larger than needed on a page are shrunk.

    Args:
        picture: with one tile at least.
    """
    side = _shown_side(picture)
    across, down = picture.cols * (side + _GAP) - _GAP, picture.rows * (side + _GAP) - _GAP
    width = across + _WIDE_GAP + side if picture.thumbnail else across
    sheet = Image.new("RGB", (width, down), _BACKGROUND)
    in_grid = picture.tiles[:-1] if picture.thumbnail else picture.tiles
    for place, tile in enumerate(in_grid):
        row, col = divmod(place, picture.cols)
        sheet.paste(_shrunk(tile_image(tile), side), (col * (side + _GAP), row * (side + _GAP)))
    if picture.thumbnail:
        sheet.paste(_shrunk(tile_image(picture.tiles[-1]), side), (across + _WIDE_GAP, (down - side) // 2))
    return sheet


def _shown_side(picture: PictureTiles) -> int:
    room = max(_LARGEST_GRID // max(picture.cols, picture.rows), _SMALLEST_TILE)
    return min(picture.tiles.shape[-1], _LARGEST_TILE, room)


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    return image if image.width == side else image.resize((side, side), Image.Resampling.LANCZOS)


def save_sheet(picture: PictureTiles, folder: Path, stem: str) -> str:
    """Write a contact sheet.

    Args:
        picture: with one tile at least.
        folder: is made where it lacks.
        stem: of the file's name.

    Returns:
        The file's name. Tiles that are shown pixel by pixel lose nothing, others are compressed.
    """
    exact = picture.tiles.shape[-1] <= _LARGEST_TILE
    name = f"{stem}.png" if exact else f"{stem}.jpg"
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(picture).save(folder / name, quality=_QUALITY)
    return name
