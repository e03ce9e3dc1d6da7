"""Which kind of video file it is, told by its bytes, and whether all of it is there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, Literal

from ivl_lightning.data.locations import MediaError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

Container = Literal["mp4", "avi", "matroska", "gif", "webp"]

_MP4_BOXES = (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
"""Boxes that an MP4 or QuickTime file begins with."""

_EBML = 0x1A45DFA3
_SEGMENT = 0x18538067


def container_of(file: BinaryIO, path: str) -> Container:
    """Tell the container from the file's first bytes, whatever the file is called.

    The list is closed: FFmpeg also knows playlists and scripts, which make it open other files and addresses.

    Args:
        file: seekable; left at its start.
        path: as written in the row, for messages.

    Raises:
        MediaError: `video_empty`, `video_undecodable` for another kind of file, or `video_truncated` for an end that
            comes before the one the file announces.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if size == 0:
        raise MediaError("video_empty", f"{shown(path)} has no bytes; fetch the file again or remove the row")
    kind = _kind(head)
    if kind is None:
        raise MediaError(
            "video_undecodable",
            f"{shown(path)} is none of the videos that are read: MP4 or QuickTime, AVI, Matroska or WebM, GIF, "
            "animated WebP, or a folder of frames; convert the file or remove the row",
        )
    if not _is_complete(file, kind, size):
        raise truncated(path)
    file.seek(0)
    return kind


def truncated(path: str) -> MediaError:
    """The error for a file that ends before the end it announces."""
    return MediaError("video_truncated", f"{shown(path)} ends too early; fetch the file again or remove the row")


def _kind(head: bytes) -> Container | None:
    if head[:4] == b"RIFF":
        forms: dict[bytes, Container] = {b"AVI ": "avi", b"WEBP": "webp"}
        return forms.get(head[8:12])
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] == _EBML.to_bytes(4, "big"):
        return "matroska"
    return "mp4" if head[4:8] in _MP4_BOXES else None


def _is_complete(file: BinaryIO, kind: Container, size: int) -> bool:
    file.seek(0)
    if kind == "mp4":
        names, end = zip(*_mp4_boxes(file, size), strict=True)
        return b"moov" in names and max(end) <= size
    if kind == "matroska":
        return _matroska_end(file) <= size
    # GIF announces no length; its reader looks for the closing byte.
    return kind == "gif" or int.from_bytes(file.read(8)[4:], "little") + 8 <= size


def _mp4_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Name and end of each box of the outermost level."""
    start = 0
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        # 1: the length follows in 8 bytes; 0: the box reaches to the end of the file.
        length = int.from_bytes(head[8:], "big") if length == 1 else length or size - start
        # A box is not shorter than its head; what follows such a one is no box.
        start += max(length, 8)
        yield head[4:8], start


def _matroska_end(file: BinaryIO) -> int:
    """Where the segment, which holds everything but the head, ends; 0 where the file does not say."""
    for _ in range(2):
        identifier = _ebml_number(file, keep_marker=True)
        length = _ebml_number(file, keep_marker=False)
        if identifier == _SEGMENT or length is None:
            return 0 if length is None else file.tell() + length
        file.seek(length, os.SEEK_CUR)
    return 0


def _ebml_number(file: BinaryIO, *, keep_marker: bool) -> int | None:
    """A number whose first byte's leading zeros tell its width; None for all ones, which means unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    width = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(width - 1), "big")
    ones = (1 << 7 * width) - 1
    if keep_marker:
        return value
    return None if value & ones == ones else value & ones
