"""Frames of animated GIF and WebP files, which Pillow decodes and FFmpeg does not, or not exactly."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ivl_lightning.data.containers import truncated
from ivl_lightning.data.locations import MediaError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

T = TypeVar("T")

DEFAULT_DELAY = 100
"""Milliseconds a frame is shown that asks for none, as in browsers."""

_GIF_HEAD = 13
_GIF_EXTENSION, _GIF_IMAGE, _GIF_END, _GIF_FILLER = b"!", b",", b";", b"\0"
_GIF_CONTROL = 0xF9

_WEBP_HEAD = 30
_WEBP_ALPHA, _WEBP_EXIF = 0x10, 0x08


class WebpHead(NamedTuple):
    """What the first 30 bytes of a WebP file say.

    Attributes:
        width: pixels.
        height: pixels.
        has_alpha: whether Pillow reads it as RGBA.
        has_exif: whether an EXIF block follows, behind the pixels.
    """

    width: int
    height: int
    has_alpha: bool
    has_exif: bool


def frame_delays(file: BinaryIO, kind: Literal["gif", "webp"], path: str) -> np.ndarray:
    """Milliseconds that each frame is shown, from the file's blocks; no pixel is decoded.

    Args:
        file: the file; it is read from its start.
        kind: what `container_of` said.
        path: as written in the row, for messages.

    Returns:
        int64 `[frames]`.

    Raises:
        MediaError: `video_truncated`, or `video_undecodable` for a GIF with a frame that does not fit on its canvas.
    """
    file.seek(0)
    delays = np.array(list(_gif_delays(file, path) if kind == "gif" else _webp_delays(file)), dtype=np.int64)
    return np.where(delays > 0, delays, DEFAULT_DELAY)


def load_animation(
    file: BinaryIO, kind: Literal["gif", "webp"], indices: Collection[int], path: str, then: Callable[[Image.Image], T]
) -> dict[int, T]:
    """Decode frames of an animation. Each builds on the ones before it, so all up to the last are decoded.

    Args:
        file: the file; it is read from its start.
        kind: what `container_of` said.
        indices: frames wanted.
        path: as written in the row, for messages.
        then: what to keep of a frame, an RGB image.

    Returns:
        What is kept, by index.

    Raises:
        MediaError: `video_undecodable` for a frame that would enlarge the canvas.
        OSError, EOFError, SyntaxError, ValueError: by Pillow for broken data.
    """
    file.seek(0)
    frames = {}
    wanted = frozenset(indices)
    with Image.open(file, formats=[kind.upper()]) as animation:
        size = animation.size
        for index in range(max(wanted, default=-1) + 1):
            # Pillow decodes a frame when it goes on to the next one, so that each size is seen before.
            animation.seek(index)
            if animation.size != size:
                raise _too_large_for(size, index, animation.size, path)
            if index in wanted:
                animation.load()
                frames[index] = then(animation.convert("RGB"))
    return frames


def webp_head(head: bytes) -> WebpHead | None:
    """Read size and flags from the first bytes of a file.

    Args:
        head: at least 30 bytes, where the file has them.

    Returns:
        None if it is no WebP file, or a broken one.
    """
    kind = head[12:16] if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) >= _WEBP_HEAD else b""
    if kind == b"VP8X":
        width, height = (int.from_bytes(head[start : start + 3], "little") + 1 for start in (24, 27))
        return WebpHead(width, height, bool(head[20] & _WEBP_ALPHA), bool(head[20] & _WEBP_EXIF))
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return WebpHead((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1), has_exif=False)
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(head[start : start + 2], "little") & 0x3FFF for start in (26, 28))
        return WebpHead(width, height, has_alpha=False, has_exif=False)
    return None


def webp_exif(file: BinaryIO) -> bytes:
    """The EXIF block of a WebP file, or nothing; what lies before it is not read.

    Args:
        file: the file; it is read from its start.
    """
    for name, length in _webp_chunks(file):
        if name == b"EXIF":
            return file.read(length)
    return b""


def _gif_delays(file: BinaryIO, path: str) -> Iterator[int]:
    head = file.read(_GIF_HEAD)
    canvas = _pair(head[6:10])
    _skip_palette(file, head[10:11])
    # In hundredths of a second.
    delay = frames = 0
    before = b""
    while (introducer := file.read(1)) != _GIF_END:
        if introducer == _GIF_EXTENSION:
            delay = _extension_delay(file, path, delay)
        elif introducer == _GIF_IMAGE:
            canvas = _image_canvas(file, canvas, frames, path)
            yield delay * 10
            delay, frames = 0, frames + 1
        elif not introducer and before == _GIF_IMAGE:
            # Some programs leave the closing byte out. Behind a whole image nothing else can be told to be missing.
            return
        elif introducer != _GIF_FILLER:
            raise truncated(path)
        before = introducer


def _extension_delay(file: BinaryIO, path: str, delay: int) -> int:
    """Skip an extension; the delay it sets, or the one before."""
    label = file.read(1)
    block = _sub_block(file, path)
    _skip_sub_blocks(file, path, block)
    return int.from_bytes(block[1:3], "little") if label == bytes([_GIF_CONTROL]) else delay


def _image_canvas(file: BinaryIO, canvas: tuple[int, int], index: int, path: str) -> tuple[int, int]:
    """Skip an image, and give the canvas that Pillow has with it: the first image may enlarge it, no later one."""
    descriptor = file.read(9)
    (left, top), (width, height) = _pair(descriptor[:4]), _pair(descriptor[4:8])
    reached = max(canvas[0], left + width), max(canvas[1], top + height)
    if index and reached != canvas:
        raise _too_large_for(canvas, index, reached, path)
    _skip_palette(file, descriptor[8:])
    file.seek(1, os.SEEK_CUR)
    _skip_sub_blocks(file, path, _sub_block(file, path))
    return reached


def _pair(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little")


def _too_large_for(canvas: tuple[int, int], index: int, reached: tuple[int, int], path: str) -> MediaError:
    return MediaError(
        "video_undecodable",
        f"frame {index} of {shown(path)} reaches to {reached[0]} x {reached[1]} pixels, beyond the canvas of "
        f"{canvas[0]} x {canvas[1]}; write the animation anew or remove the row",
    )


def _skip_palette(file: BinaryIO, flags: bytes) -> None:
    if flags and flags[0] & 0x80:
        file.seek(3 << (flags[0] & 7) + 1, os.SEEK_CUR)


def _sub_block(file: BinaryIO, path: str) -> bytes:
    length = file.read(1)
    block = file.read(length[0]) if length else b""
    if not length or len(block) < length[0]:
        raise truncated(path)
    return block


def _skip_sub_blocks(file: BinaryIO, path: str, block: bytes) -> None:
    while block:
        block = _sub_block(file, path)


def _webp_delays(file: BinaryIO) -> Iterator[int]:
    """Delay of each ANMF chunk, in milliseconds in its bytes 12 to 14; a still image has no such chunk."""
    animated = False
    for name, length in _webp_chunks(file):
        if name == b"ANMF" and length:
            animated = True
            yield int.from_bytes(file.read(min(length, 16))[12:15], "little")
    if not animated:
        yield 0


def _webp_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Name and length of each chunk of the outermost level; the file stands at the chunk's data."""
    start = 12
    file.seek(start)
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[4:], "little")
        yield head[:4], length
        start += 8 + length + length % 2
        file.seek(start)
