"""Frames of animated GIF and WebP files, which Pillow decodes and FFmpeg does not, or not exactly."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image

from ivl_lightning.data.containers import truncated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEFAULT_DELAY = 100
"""Milliseconds a frame is shown that asks for none, as in browsers."""

_GIF_HEAD = 13
_GIF_EXTENSION, _GIF_IMAGE, _GIF_END = b"!", b",", b";"
_GIF_CONTROL = 0xF9


def frame_delays(file: BinaryIO, kind: Literal["gif", "webp"], path: str) -> np.ndarray:
    """Milliseconds that each frame is shown, from the file's blocks; no pixel is decoded.

    Args:
        file: the file; it is read from its start.
        kind: what `container_of` said.
        path: as written in the row, for messages.

    Returns:
        int64 `[frames]`.

    Raises:
        MediaError: `video_truncated`.
    """
    file.seek(0)
    delays = np.array(list(_gif_delays(file, path) if kind == "gif" else _webp_delays(file)), dtype=np.int64)
    return np.where(delays > 0, delays, DEFAULT_DELAY)


def load_animation(file: BinaryIO, kind: Literal["gif", "webp"], indices: Sequence[int]) -> dict[int, Image.Image]:
    """Decode frames of an animation. Each builds on the ones before it, so all up to the last are decoded.

    Args:
        file: the file; it is read from its start.
        kind: what `container_of` said.
        indices: frames wanted.

    Returns:
        RGB images by index.

    Raises:
        OSError, EOFError, SyntaxError, ValueError: by Pillow for broken data.
    """
    file.seek(0)
    frames = {}
    with Image.open(file, formats=[kind.upper()]) as animation:
        for index in sorted(set(indices)):
            animation.seek(index)
            animation.load()
            frames[index] = animation.convert("RGB")
    return frames


def _gif_delays(file: BinaryIO, path: str) -> Iterator[int]:
    head = file.read(_GIF_HEAD)
    _skip_palette(file, head[10:11])
    # In hundredths of a second.
    delay = 0
    while (introducer := file.read(1)) != _GIF_END:
        if introducer == _GIF_EXTENSION:
            label = file.read(1)
            block = _sub_block(file, path)
            if label == bytes([_GIF_CONTROL]):
                delay = int.from_bytes(block[1:3], "little")
            _skip_sub_blocks(file, path, block)
        elif introducer == _GIF_IMAGE:
            _skip_palette(file, file.read(9)[8:])
            file.seek(1, os.SEEK_CUR)
            _skip_sub_blocks(file, path, _sub_block(file, path))
            yield delay * 10
            delay = 0
        else:
            raise truncated(path)


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
    file.seek(12)
    animated = False
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[4:], "little")
        data = file.read(min(length, 16)) if head[:4] == b"ANMF" else b""
        file.seek(length + length % 2 - len(data), os.SEEK_CUR)
        if data:
            animated = True
            yield int.from_bytes(data[12:15], "little")
    if not animated:
        yield 0
