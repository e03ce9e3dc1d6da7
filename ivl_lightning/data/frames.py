"""Frames of a video file by number, exactly those and no more decoding than they need.

FFmpeg, through PyAV, reads MP4, AVI and Matroska; Pillow reads GIF and WebP. A first pass over the packets tells
when each frame is shown; a second one decodes, from the key frame before each wanted frame up to that frame.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
from PIL import Image

from ivl_lightning.data.animation import frame_delays, load_animation
from ivl_lightning.data.containers import container_of
from ivl_lightning.data.locations import MediaError, shown
from ivl_lightning.data.storage import MissingPackageError
from ivl_lightning.data.timeline import Timeline, needed_places, read_timeline, stretches
from ivl_lightning.data.video import VideoHeader, clip_header, frame_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from av.container import InputContainer
    from av.packet import Packet
    from av.video import VideoFrame, VideoStream

    from ivl_lightning.data.containers import Container
    from ivl_lightning.data.timeline import Mark, Stretch
    from ivl_lightning.data.video import Clip

_PROBED = 4
"""How many times the pixel limit FFmpeg may look at on opening."""

_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def read_video_header(file: BinaryIO, path: str, clip: Clip | None, max_pixels: int) -> VideoHeader:
    """Size, frames and times of a video without decoding it.

    Frames are counted by the container's index. Where it has none (Matroska, fragmented MP4), and for a clip, the
    packets are read and counted.

    Args:
        file: seekable.
        path: as written in the row, for messages.
        clip: start and end in seconds, or None for the whole video.
        max_pixels: frames with more are refused.

    Raises:
        MediaError: `video_empty`, `video_truncated`, `video_too_large`, or `video_undecodable`.
        ValueError: PyAV is not installed.
    """
    kind = container_of(file, path)
    if kind == "gif" or kind == "webp":
        with _reported(path), Image.open(file, formats=[kind.upper()]) as image:
            size = _checked_size(*image.size, max_pixels, path)
            delays = frame_delays(file, kind, path)
            return clip_header(size, _starts(delays), delays.sum() / 1000, None, clip, path)
    with _opened(file, kind, path, max_pixels) as (container, stream):
        frames = _indexed_frames(stream) if clip is None else None
        if frames:
            return _indexed_header(container, stream, frames)
        timeline = read_timeline(container, stream)
        size = stream.width, stream.height
        return clip_header(size, timeline.times, timeline.end, _rate(stream), clip, path)


def read_frames(
    file: BinaryIO, path: str, indices: Sequence[int], clip: Clip | None, max_pixels: int
) -> list[Image.Image]:
    """Decode frames by their number in the order they are shown.

    Args:
        file: seekable; containers read by FFmpeg are gone through twice.
        path: as written in the row, for messages.
        indices: frame numbers inside of the clip; any order, repeats allowed.
        clip: start and end in seconds, or None for the whole video.
        max_pixels: frames with more are refused.

    Returns:
        RGB images, one for each index; a repeated index gives the same object.

    Raises:
        MediaError: as `read_video_header`, and `video_frame_missing` for an index beyond the last frame.
        ValueError: PyAV is not installed.
    """
    kind = container_of(file, path)
    if kind == "gif" or kind == "webp":
        times = _starts(frame_delays(file, kind, path))
        numbers = frame_numbers(times, indices, clip, path)
        with _reported(path):
            with Image.open(file, formats=[kind.upper()]) as image:
                _checked_size(*image.size, max_pixels, path)
            found = load_animation(file, kind, numbers)
        return [found[number] for number in numbers]
    with _opened(file, kind, path, max_pixels) as (container, stream):
        timeline = read_timeline(container, stream)
        announced = _indexed_frames(stream)
    if announced not in (None, len(timeline.times)):
        raise MediaError(
            "video_truncated",
            f"{shown(path)} announces {announced} frames and holds {len(timeline.times)}; fetch the file again or "
            "remove the row",
        )
    numbers = frame_numbers(timeline.times, indices, clip, path)
    found = _decoded(file, kind, path, max_pixels, timeline, frozenset(numbers))
    return [found[number] for number in numbers]


def _starts(delays: np.ndarray) -> np.ndarray:
    return (np.cumsum(delays) - delays) / 1000


def _checked_size(width: int, height: int, max_pixels: int, path: str) -> tuple[int, int]:
    if width < 1 or height < 1:
        raise MediaError(
            "video_undecodable",
            f"{shown(path)} has no size, or one far above data.max_pixels={max_pixels}; replace the file or remove the "
            "row",
        )
    if width * height > max_pixels:
        raise MediaError(
            "video_too_large",
            f"frames of {shown(path)} have {width} x {height} = {width * height} pixels, more than "
            f"data.max_pixels={max_pixels}; shrink the video or raise the limit",
        )
    return width, height


def _pyav() -> Any:
    # Not imported above: it is an extra, and its libraries take a moment to load.
    try:
        return import_module("av")
    except ImportError as error:
        # No MediaError: it would set aside every row with a video, as if the files were at fault.
        raise MissingPackageError(
            f"videos need PyAV, which cannot be imported ({error}): pip install 'ivl-lightning[video]'"
        ) from error


@contextmanager
def _reported(path: str) -> Iterator[None]:
    try:
        yield
    except (MediaError, MissingPackageError):
        raise
    # Broad on purpose, as for images: decoders raise what they like, and one bad file must not end a run of days.
    except Exception as error:
        raise MediaError(
            "video_undecodable",
            f"{shown(path)}: the video cannot be decoded; convert it or remove the row ({type(error).__name__}: "
            f"{error})",
        ) from error


@contextmanager
def _opened(
    file: BinaryIO, kind: Container, path: str, max_pixels: int
) -> Iterator[tuple[InputContainer, VideoStream]]:
    pyav = _pyav()
    # FFmpeg decodes a frame or two on opening, and forgets the size of those above its limit. With some room there,
    # too large a video is called by its name; one beyond even that is still never decoded.
    probing = {"max_pixels": str(_PROBED * max_pixels)}
    with _reported(path):
        file.seek(0)
        # Given the format FFmpeg does not guess, and so never takes a file for a playlist of other files.
        with pyav.open(file, format=kind, options=probing, io_open=_refuse_second_file) as container:
            stream = container.streams.best("video")
            # There is no codec where the build of FFmpeg lacks it, or where the file's description of it is broken.
            if stream is None or stream.codec_context is None:
                what = "no video stream" if stream is None else "a video stream of unknown coding"
                raise MediaError("video_undecodable", f"{shown(path)} has {what}; convert it or remove the row")
            _checked_size(stream.width, stream.height, max_pixels, path)
            stream.codec_context.options = {"max_pixels": str(max_pixels)}
            # Workers run side by side already.
            stream.codec_context.thread_count = 1
            yield container, stream


def _refuse_second_file(url: str, flags: int, options: Mapping[str, str]) -> NoReturn:
    raise PermissionError(f"the video asks for another file, {shown(url)}; a video must be whole in itself")


def _indexed_frames(stream: VideoStream) -> int | None:
    """Frames that are shown by the container's index, or None where it has no complete one."""
    # A fragmented MP4 announces the frames of its first fragment only, and an edit list can cut or double frames.
    if stream.frames == 0 or len(stream.index_entries) != stream.frames:
        return None
    # AVI marks a moment without a new frame by an entry of no bytes.
    return sum(entry.size > 0 and not entry.is_discard for entry in stream.index_entries)


def _rate(stream: VideoStream) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _indexed_header(container: InputContainer, stream: VideoStream, frames: int) -> VideoHeader:
    rate = _rate(stream)
    duration = 0.0
    if stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    elif container.duration:
        duration = container.duration / 1e6
    # Of two values that must agree one may be missing; a still picture has neither and counts as a second.
    duration = duration or (frames / rate if rate else 1.0)
    return VideoHeader(stream.width, stream.height, frames, rate or frames / duration, duration)


def _decoded(
    file: BinaryIO, kind: Container, path: str, max_pixels: int, timeline: Timeline, numbers: frozenset[int]
) -> dict[int, Image.Image]:
    found: dict[int, Image.Image] = {}
    if timeline.order is not None:
        with _opened(file, kind, path, max_pixels) as (container, stream):
            plan = stretches(timeline.marks, timeline.order, numbers)
            found = _by_stamp(container, stream, timeline.marks, plan)
    if len(found) == len(numbers):
        return found
    with _opened(file, kind, path, max_pixels) as (container, stream):
        return _by_count(container, stream, timeline, numbers, path)


def _by_stamp(
    container: InputContainer, stream: VideoStream, marks: list[Mark], plan: Iterable[Stretch]
) -> dict[int, Image.Image]:
    """Decode each stretch and pick frames by their time stamps; stop at the first stretch that is not whole."""
    found: dict[int, Image.Image] = {}
    packets = enumerate(packet for packet in container.demux(stream) if packet.size)
    for stretch in plan:
        needed = needed_places(marks, stretch)
        images, stamps = {}, []
        for frame in _stretch_frames(stream, stretch.last, needed, packets):
            # Damage spreads to the frames that build on it.
            if frame.is_corrupt or frame.pts is None:
                return found
            stamps.append(frame.pts)
            if frame.pts in stretch.wanted:
                images[stretch.wanted[frame.pts]] = _image(frame)
        # A frame that is missing would be missing in those that build on it, and stamps out of order are wrong ones.
        if len(stamps) != sum(marks[place].is_shown for place in needed) or stamps != sorted(stamps):
            return found
        found |= images
    return found


def _stretch_frames(
    stream: VideoStream, last: int, needed: frozenset[int], packets: Iterator[tuple[int, Packet[VideoStream]]]
) -> Iterator[VideoFrame]:
    """Frames of one stretch; `packets` is left behind its last packet."""
    stream.codec_context.flush_buffers()
    for place, packet in packets:
        if place in needed:
            yield from stream.codec_context.decode(packet)
        if place >= last:
            break
    yield from stream.codec_context.decode(None)


def _by_count(
    container: InputContainer, stream: VideoStream, timeline: Timeline, numbers: frozenset[int], path: str
) -> dict[int, Image.Image]:
    """Decode from the start and count frames as they come, which is the order they are shown in.

    All are decoded, because only then is it sure that none is missing before a wanted one.
    """
    found: dict[int, Image.Image] = {}
    count = 0
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise MediaError(
                "video_undecodable",
                f"{shown(path)} is damaged at its frame {count} or just before; fetch the file again or remove the row",
            )
        if count in numbers:
            found[count] = _image(frame)
        count += 1
    if count == len(timeline.times):
        return found
    raise MediaError(
        "video_undecodable",
        f"{shown(path)} has {len(timeline.times)} frames, of which {count} can be decoded; fetch the file again, "
        "convert it or remove the row",
    )


def _image(frame: VideoFrame) -> Image.Image:
    image = frame.to_image()
    turn = _TURNS.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)
