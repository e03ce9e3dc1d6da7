"""Which kind of video file it is, told by its bytes, and whether all of it is there."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np

from ivl_lightning.data.locations import MediaError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

Container = Literal["mp4", "avi", "matroska", "gif", "webp"]

_MP4_BOXES = (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
"""Boxes that an MP4 or QuickTime file begins with."""

_MORE_BOXES = (b"moof", b"mfra", b"sidx", b"ssix", b"meta", b"udta", b"uuid", b"emsg", b"prft", b"pdin")
"""Others of the outermost level. What is called neither so nor so is not needed, and may be no box at all."""

_MOST_BOXES = 100_000
_UNKNOWN_BOXES = 16

_EBML = 0x1A45DFA3
_SEGMENT = 0x18538067


def container_of(file: BinaryIO, path: str) -> Container:
    """Tell the container from the file's first bytes, whatever the file is called.

    The list is closed: FFmpeg also knows playlists and scripts, which make it open other files and addresses.

    Args:
        file: seekable; left at its start.
        path: as written in the row, for messages.

    Raises:
        MediaError: `video_empty`, `video_undecodable` for another kind of file or an MP4 of more than 100,000 boxes,
            or `video_truncated` for an end that comes before the one the file announces.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if size == 0:
        raise MediaError("video_empty", f"{shown(path)} has no bytes; fetch the file again or remove the row")
    kind = _kind(head) or _mp4_behind(file, size, path)
    if kind is None:
        raise MediaError(
            "video_undecodable",
            f"{shown(path)} is none of the videos that are read: MP4 or QuickTime, AVI, Matroska or WebM, GIF, "
            "animated WebP, or a folder of frames; convert the file or remove the row",
        )
    if not _is_complete(file, kind, size, path):
        raise truncated(path)
    file.seek(0)
    return kind


def mp4_sample_times(file: BinaryIO, track: int, samples: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Read when the samples of an MP4 track are decoded and shown, from the tables at its head or end.

    Args:
        file: seekable.
        track: its number in the file.
        samples: how many there must be.

    Returns:
        For each sample how long it lasts and how much later than decoded it is shown, but for a constant; int64
        `[samples]`. None where the tables are not there or do not fit, or an edit list takes the samples to pieces.
    """
    size = file.seek(0, os.SEEK_END)
    for movie in _inner_boxes(file, (0, size), b"moov"):
        for trak in _inner_boxes(file, movie, b"trak"):
            if track in [_track_number(file, start) for start, _ in _inner_boxes(file, trak, b"tkhd")]:
                return _sample_times(file, trak, samples) if _is_shown_in_one_go(file, trak) else None
    return None


def _is_shown_in_one_go(file: BinaryIO, trak: tuple[int, int]) -> bool:
    """Whether the edit list, if there is one, has a single piece; times of nothing before it only shift it."""
    pieces = 0
    for edits in _inner_boxes(file, trak, b"edts"):
        for start, end in _inner_boxes(file, edits, b"elst"):
            file.seek(start)
            head = file.read(8)
            # Lasting and start have 8 bytes each in version 1, else 4; a start of -1 is that of nothing.
            width = 8 if head[:1] == b"\1" else 4
            entries = file.read(min(end - start - 8, int.from_bytes(head[4:], "big") * (2 * width + 4)))
            starts = (entries[at + width : at + 2 * width] for at in range(0, len(entries), 2 * width + 4))
            pieces += sum(stamp != b"\xff" * width for stamp in starts)
    return pieces <= 1


def _sample_times(file: BinaryIO, trak: tuple[int, int], samples: int) -> tuple[np.ndarray, np.ndarray] | None:
    span: tuple[int, int] | None = trak
    for name in (b"mdia", b"minf", b"stbl"):
        span = next(_inner_boxes(file, span, name), None) if span else None
    if span is None:
        return None
    lasting = _runs(file, next(_inner_boxes(file, span, b"stts"), None), samples)
    table = next(_inner_boxes(file, span, b"ctts"), None)
    delays = np.zeros(samples, dtype=np.int64) if table is None else _runs(file, table, samples)
    return None if lasting is None or delays is None else (lasting, delays)


def _track_number(file: BinaryIO, start: int) -> int:
    file.seek(start)
    head = file.read(24)
    # Version 1 has times of 8 bytes in place of 4 before it.
    return int.from_bytes(head[20:24] if head[:1] == b"\1" else head[12:16], "big")


def _runs(file: BinaryIO, span: tuple[int, int] | None, samples: int) -> np.ndarray | None:
    """A table of pairs, how often and which value, written out; None if it is not one for so many samples."""
    if span is None:
        return None
    file.seek(span[0] + 4)
    count = int.from_bytes(file.read(4), "big")
    if span[0] + 8 + 8 * count > span[1]:
        return None
    pairs = np.frombuffer(file.read(8 * count), dtype=">i4").reshape(-1, 2).astype(np.int64)
    if len(pairs) != count or (pairs[:, 0] < 0).any() or pairs[:, 0].sum() != samples:
        return None
    return pairs[:, 1].repeat(pairs[:, 0])


def _inner_boxes(file: BinaryIO, span: tuple[int, int], name: bytes) -> Iterator[tuple[int, int]]:
    """Where the contents of the boxes of a name begin and end; those of the level that fills `span`."""
    start, end = span
    for _ in range(_MOST_BOXES):
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        is_long = length == 1
        length = int.from_bytes(head[8:], "big") if is_long else length or end - start
        if start + 8 > end or length < 8 or start + length > end:
            return
        if head[4:8] == name:
            yield start + (16 if is_long else 8), start + length
        start += length


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


def _mp4_behind(file: BinaryIO, size: int, path: str) -> Container | None:
    """MP4 behind a box of unknown name, where whole boxes lead on to one that is known."""
    boxes = islice(_mp4_boxes(file, size, path), _UNKNOWN_BOXES)
    first = next((name for name, end in boxes if name in _MP4_BOXES or end > size), b"")
    return "mp4" if first in _MP4_BOXES else None


def _is_complete(file: BinaryIO, kind: Container, size: int, path: str) -> bool:
    file.seek(0)
    if kind == "mp4":
        return _is_complete_mp4(file, size, path)
    if kind == "matroska":
        return _matroska_end(file) <= size
    # GIF announces no length; its reader goes from block to block.
    return kind == "gif" or int.from_bytes(file.read(8)[4:], "little") + 8 <= size


def _is_complete_mp4(file: BinaryIO, size: int, path: str) -> bool:
    found: set[bytes] = set()
    for name, end in _mp4_boxes(file, size, path):
        if end > size:
            # Bytes that were appended to a whole file look like the head of a box, but not like one of these.
            return name not in (*_MP4_BOXES, *_MORE_BOXES) and found == {b"moov", b"mdat"}
        if name in (b"moov", b"mdat"):
            found.add(name)
    return b"moov" in found


def _mp4_boxes(file: BinaryIO, size: int, path: str) -> Iterator[tuple[bytes, int]]:
    """Name and end of each box of the outermost level."""
    start = count = 0
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        # 1: the length follows in 8 bytes; 0: the box reaches to the end of the file.
        length = int.from_bytes(head[8:], "big") if length == 1 else length or size - start
        # A box is not shorter than its head; what follows such a one is no box.
        start += max(length, 8)
        count += 1
        if count > _MOST_BOXES:
            raise MediaError(
                "video_undecodable",
                f"{shown(path)} has more than {_MOST_BOXES} boxes; convert the file or remove the row",
            )
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
