"""What the headers of a row's pictures tell; no pixel is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ivl_lightning.data.annotations import RowMedia
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.locations import url_scheme
from ivl_lightning.data.media import ImageHeader, MediaReader
from ivl_lightning.data.tiling import count_tiles
from ivl_lightning.reporting.audit.findings import Scan, place
from ivl_lightning.structures import Record

EXIF, GRAY16, SMALL, STRETCHED = "exif_rotated", "gray16", "small_picture", "extreme_aspect"
SHRUNK = "shrunk"
SMALLEST_SIDE = 28
"""Pixels; a token of the model covers 28 x 28 pixels of a tile."""
LARGEST_ASPECT = 10
_UPRIGHT = (0, 1)


def is_remote(media: RowMedia, reader: MediaReader) -> bool:
    """Whether a picture of the row lies behind a URL, so that looking at its header fetches it."""
    return bool(media.images) and any(url_scheme(path) is not None for path in (reader.root, *media.images))


def note_headers(scan: Scan, encoder: RowEncoder, record: Record, media: RowMedia, tiles: int) -> None:
    """Note what is remarkable about a row's pictures, each property once a row.

    Args:
        scan: of its dataset.
        encoder: of its dataset.
        record: the row.
        media: of the row.
        tiles: that the row was measured to have.

    Raises:
        RowError: a header cannot be read.
    """
    reader = encoder.reader
    found = {name for path in media.images for name in _remarks(reader.header(path), reader)}
    if media.images and encoder.settings.over_length == "shrink" and tiles < most_tiles(encoder, media.images):
        found.add(SHRUNK)
    for name in sorted(found):
        scan.remark(name, place(record))


def _remarks(header: ImageHeader, reader: MediaReader) -> Iterator[str]:
    short, long = sorted((header.width, header.height))
    if header.orientation not in _UPRIGHT and not reader.exif_transpose:
        yield EXIF
    if header.mode.startswith("I;16") and reader.gray16 == "clip":
        yield GRAY16
    if short < SMALLEST_SIDE:
        yield SMALL
    if long > LARGEST_ASPECT * short:
        yield STRETCHED


def most_tiles(encoder: RowEncoder, paths: Sequence[str], limit: int | None = None) -> int:
    """Tiles of a row's pictures, thumbnails included.

    Args:
        encoder: of its dataset.
        paths: of the row.
        limit: grid tiles of each; None for those that the settings give.

    Raises:
        RowError: a header cannot be read.
    """
    tiling = encoder.settings.tiling(limit or encoder.tile_limit(len(paths)))
    return sum(count_tiles(*encoder.reader.image_size(path), **tiling) for path in paths)
