"""Frames of a video file by number, exactly those and no more decoding than they need.

FFmpeg, through PyAV, reads MP4, AVI and Matroska; Pillow reads GIF and WebP. The tables of an MP4, or a
first pass over the packets, tell when each frame is shown; then packets are decoded from the key frame before each
wanted frame up to that frame.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar

import numpy as np
from PIL import Image

from ivl_lightning.data.animation import frame_delays, load_animation
from ivl_lightning.data.containers import container_of, mp4_sample_times
from ivl_lightning.data.locations import MediaError, shown
from ivl_lightning.data.storage import MissingPackageError, file_identity, machine_fault
from ivl_lightning.data.timeline import (
    Timeline,
    can_hide_frames,
    indexed_timeline,
    mark_of,
    needed_places,
    read_timeline,
    stretches,
)
from ivl_lightning.data.video import VideoHeader, clip_header, frame_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from av.container import InputContainer
    from av.packet import Packet
    from av.video import VideoFrame, VideoStream

    from ivl_lightning.data.containers import Container
    from ivl_lightning.data.timeline import Mark, Stretch
    from ivl_lightning.data.video import Clip

_PROBED = 4
"""How many times the pixel limit FFmpeg may look at on opening."""

_NEAR = 4
"""Packets that are rather read over than jumped over."""

_KEPT_TIMELINES = 2
"""Timelines that are kept: many rows can be clips of one video. That of an hour takes about 20 MB."""

_timelines: dict[tuple[int, ...], Timeline] = {}

T = TypeVar("T")

_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class CallerError(Exception):
    """What the caller's own function raised: no fault of the file, so it is not told as one."""

    def __init__(self, own: Exception) -> None:
        super().__init__(str(own))
        self.own = own


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
        timeline = _timeline(file, container, stream)
        size = stream.width, stream.height
        return clip_header(size, timeline.times, timeline.end, _rate(stream), clip, path)


def read_frames(
    file: BinaryIO,
    path: str,
    indices: Sequence[int],
    clip: Clip | None,
    max_pixels: int,
    then: Callable[[Image.Image], T],
) -> list[T]:
    """Decode frames by their number in the order they are shown.

    Args:
        file: seekable; FFmpeg reads an MP4 with a whole index where frames are wanted, and goes through others twice.
        path: as written in the row, for messages.
        indices: frame numbers inside of the clip; any order, repeats allowed.
        clip: start and end in seconds, or None for the whole video.
        max_pixels: frames with more are refused.
        then: what to keep of a frame, an RGB image. Called in the order of decoding, as a rule once for each frame:
            where a file must be decoded in a second way, for all frames again. What it raises comes out in a
            `CallerError`.

    Returns:
        What `then` gave, one for each index; a repeated index gives the same object.

    Raises:
        MediaError: as `read_video_header`, and `video_frame_missing` for an index beyond the last frame.
        ValueError: PyAV is not installed.
    """
    then = _guarded(then)
    kind = container_of(file, path)
    if kind == "gif" or kind == "webp":
        times = _starts(frame_delays(file, kind, path))
        numbers = frame_numbers(times, indices, clip, path)
        with _reported(path):
            with Image.open(file, formats=[kind.upper()]) as image:
                _checked_size(*image.size, max_pixels, path)
            found = load_animation(file, kind, numbers, path, then)
        return [found[number] for number in numbers]
    for by_tables in (True, False):
        video = _surveyed(file, kind, path, max_pixels, by_tables=by_tables)
        if video is not None:
            numbers = frame_numbers(video.timeline.times, indices, clip, path)
            found = (_jumped if by_tables else _decoded)(video, frozenset(numbers), then)
            if found.keys() >= set(numbers):
                break
    return [found[number] for number in numbers]


def _surveyed(file: BinaryIO, kind: Container, path: str, max_pixels: int, *, by_tables: bool) -> _Video | None:
    """What the first pass tells; `by_tables` for what an MP4's index tells in its place, None where it does not."""
    with _opened(file, kind, path, max_pixels) as (container, stream):
        announced = _indexed_frames(stream)
        has_index = kind == "mp4" and announced is not None
        size = stream.width, stream.height
        if by_tables:
            timeline = _table_timeline(file, container, stream) if has_index else None
        else:
            timeline = _timeline(file, container, stream)
    if timeline is None:
        return None
    if announced not in (None, len(timeline.times)):
        raise MediaError(
            "video_truncated",
            f"{shown(path)} announces {announced} frames and holds {len(timeline.times)}; fetch the file again or "
            "remove the row",
        )
    return _Video(file, kind, path, max_pixels, timeline, has_index, size)


def _table_timeline(file: BinaryIO, container: InputContainer, stream: VideoStream) -> Timeline | None:
    # One that was read is better.
    if file_identity(file) in _timelines:
        return None
    place = file.tell()
    tables = mp4_sample_times(file, stream.id, stream.frames)
    size = file.seek(0, os.SEEK_END)
    # FFmpeg reads on from where it was.
    file.seek(place)
    return None if tables is None else indexed_timeline(container, stream, *tables, size)


def _guarded(then: Callable[[Image.Image], T]) -> Callable[[Image.Image], T]:
    def guarded(image: Image.Image) -> T:
        try:
            return then(image)
        except Exception as error:
            raise CallerError(error) from error

    return guarded


@dataclass(frozen=True)
class _Video:
    """A file that FFmpeg reads, and what its first pass told. The size is that of its frames before turning."""

    file: BinaryIO
    kind: Container
    path: str
    max_pixels: int
    timeline: Timeline
    has_index: bool
    size: tuple[int, int]

    def opened(self) -> AbstractContextManager[tuple[InputContainer, VideoStream]]:
        return _opened(self.file, self.kind, self.path, self.max_pixels)

    def image(self, frame: VideoFrame) -> Image.Image:
        if (frame.width, frame.height) != self.size:
            raise MediaError(
                "video_undecodable",
                f"{shown(self.path)} has frames of {self.size[0]} x {self.size[1]} and of {frame.width} x "
                f"{frame.height} pixels; convert it to one size or remove the row",
            )
        return _upright(frame)


def _timeline(file: BinaryIO, container: InputContainer, stream: VideoStream) -> Timeline:
    identity = file_identity(file)
    known = _timelines.pop(identity, None) if identity else None
    timeline = known or read_timeline(container, stream)
    if identity:
        _timelines[identity] = timeline
        while len(_timelines) > _KEPT_TIMELINES:
            _timelines.pop(next(iter(_timelines)))
    return timeline


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
    except (MediaError, MissingPackageError, CallerError):
        raise
    # Broad on purpose, as for images: decoders raise what they like, and one bad file must not end a run of days.
    except Exception as error:
        if fault := machine_fault(error, path):
            raise fault from error
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


def _decoded(video: _Video, numbers: frozenset[int], then: Callable[[Image.Image], T]) -> dict[int, T]:
    if video.timeline.order is not None:
        found = _jumped(video, numbers, then) if video.has_index else {}
        if len(found) == len(numbers):
            return found
        with video.opened() as (container, stream):
            found = _by_stamp(_Packets(container, stream, video.timeline.marks, jumps=False), video, numbers, then)
        if len(found) == len(numbers):
            return found
    with video.opened() as (container, stream):
        return _by_count(container, stream, video, numbers, then)


def _jumped(video: _Video, numbers: frozenset[int], then: Callable[[Image.Image], T]) -> dict[int, T]:
    """Frames that are found by the container's index, as long as every packet is as the timeline has it."""
    with video.opened() as (container, stream):
        return _by_stamp(_Packets(container, stream, video.timeline.marks, jumps=True), video, numbers, then)


class _Packets:
    """Packets of a stream and their places in the order of decoding, read on from a key frame to another.

    Args:
        container: just opened.
        stream: of this container.
        marks: of all its packets.
        jumps: whether to seek by the container's index rather than to read what lies between.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, marks: list[Mark], jumps: bool) -> None:
        self.container = container
        self.stream = stream
        self.marks = marks
        self.hides_frames = can_hide_frames(stream)
        places = {mark: place for place, mark in enumerate(marks)} if jumps else {}
        # Where two packets look the same it would not be known where a jump led.
        self.places = places if len(places) == len(marks) else {}
        self.next_place = 0
        self.packets = self._demuxed()

    def read(self, first: int, last: int) -> Iterator[tuple[int, Packet[VideoStream]]]:
        """Packets from `first` or before to `last`; fewer where the file is not as it was in the first pass."""
        self._approach(first)
        while self.next_place <= last:
            packet = next(self.packets, None)
            if packet is None or mark_of(packet, self.hides_frames) != self.marks[self.next_place]:
                return
            self.next_place += 1
            yield self.next_place - 1, packet

    def _demuxed(self) -> Iterator[Packet[VideoStream]]:
        return (packet for packet in self.container.demux(self.stream) if packet.size)

    def _approach(self, first: int) -> None:
        if not self.places or first - self.next_place <= _NEAR:
            return
        # FFmpeg looks for the time of decoding, but goes a key frame back where its time of showing is later. So the
        # one leads there or, with key frames close together, beyond, and the other there or before.
        for stamp in (self.marks[first].pts, self.marks[first].dts):
            if stamp is not None and self._jump(stamp, first):
                return
        # Somewhere else: nothing is read, and the caller goes another way.
        self.packets = iter(())

    def _jump(self, stamp: int, first: int) -> bool:
        self.container.seek(stamp, stream=self.stream)
        packets = self._demuxed()
        head = next(packets, None)
        place = None if head is None else self.places.get(mark_of(head, self.hides_frames))
        if head is None or place is None or place > first:
            return False
        self.next_place, self.packets = place, chain([head], packets)
        return True


def _by_stamp(
    packets: _Packets, video: _Video, numbers: frozenset[int], then: Callable[[Image.Image], T]
) -> dict[int, T]:
    """Decode each stretch and pick frames by their time stamps; stop at the first stretch that is not whole."""
    found: dict[int, T] = {}
    marks, order = video.timeline.marks, video.timeline.order
    assert order is not None
    for stretch in stretches(marks, order, numbers):
        needed = needed_places(marks, stretch)
        kept, stamps = {}, []
        for frame in _stretch_frames(packets, stretch, needed):
            # Damage spreads to the frames that build on it.
            if frame.is_corrupt or frame.pts is None:
                return found
            stamps.append(frame.pts)
            if frame.pts in stretch.wanted:
                kept[stretch.wanted[frame.pts]] = then(video.image(frame))
        # A frame that is missing would be missing in those that build on it, and stamps out of order are wrong ones.
        if len(stamps) != sum(marks[place].is_shown for place in needed) or stamps != sorted(stamps):
            return found
        found |= kept
    return found


def _stretch_frames(packets: _Packets, stretch: Stretch, needed: Collection[int]) -> Iterator[VideoFrame]:
    decoder = packets.stream.codec_context
    decoder.flush_buffers()
    for place, packet in packets.read(stretch.first, stretch.last):
        if place in needed:
            yield from decoder.decode(packet)
    yield from decoder.decode(None)


def _by_count(
    container: InputContainer,
    stream: VideoStream,
    video: _Video,
    numbers: frozenset[int],
    then: Callable[[Image.Image], T],
) -> dict[int, T]:
    """Decode from the start and count frames as they come, which is the order they are shown in.

    All are decoded, because only then is it sure that none is missing before a wanted one.
    """
    found: dict[int, T] = {}
    total = len(video.timeline.times)
    count = 0
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise MediaError(
                "video_undecodable",
                f"{shown(video.path)} is damaged at its frame {count} or just before; fetch the file again or remove "
                "the row",
            )
        if count in numbers:
            found[count] = then(video.image(frame))
        count += 1
    if count == total:
        return found
    raise MediaError(
        "video_undecodable",
        f"{shown(video.path)} has {total} frames, of which {count} can be decoded; fetch the file again, convert it "
        "or remove the row",
    )


def _upright(frame: VideoFrame) -> Image.Image:
    image = frame.to_image()
    turn = _TURNS.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)
