"""When each frame of a video is shown, and which packets must be decoded to get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from av.container import InputContainer
    from av.packet import Packet
    from av.video import VideoStream

_VP8_SHOWN = 0x10
"""Bit of a VP8 packet's first byte (RFC 6386, 9.1). Frames that are for reference only have packets of their own."""


class Mark(NamedTuple):
    """What matters of a packet. `pts` and `dts` are in units of the stream's time base, from any origin."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_shown: bool


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each frame is shown.

    Attributes:
        marks: of all packets, in the order of decoding.
        order: place in `marks` of each shown frame, or None where time stamps do not tell which packet is which frame.
        times: seconds of each shown frame from the first one, rising, `[frames]`.
        end: seconds from the first frame to the end of the last one.
    """

    marks: list[Mark]
    order: list[int] | None
    times: np.ndarray
    end: float


class Stretch(NamedTuple):
    """Packets to decode in one go, from a key frame on.

    Attributes:
        first: place of the first packet in the order of decoding.
        last: place of the last packet, included.
        wanted: frame number by time stamp.
    """

    first: int
    last: int
    wanted: dict[int, int]


def read_timeline(container: InputContainer, stream: VideoStream) -> Timeline:
    """Read all packets of a stream, none of which is decoded.

    Args:
        container: at its start.
        stream: of this container.
    """
    hides_frames = can_hide_frames(stream)
    # The packet of size 0 behind the last one is PyAV's, to drain the decoder.
    marks = [mark_of(packet, hides_frames) for packet in container.demux(stream) if packet.size]
    return _timeline_of(marks, container, stream)


def indexed_timeline(
    container: InputContainer, stream: VideoStream, lasting: np.ndarray, delays: np.ndarray, size: int
) -> Timeline | None:
    """The timeline by an MP4 file's tables, of whose packets the first alone is read.

    FFmpeg has the time of decoding of each packet; when it is shown is taken from the file's own table, which FFmpeg
    reads too. To be safe whoever decodes compares each packet with its mark.

    Args:
        container: at its start.
        stream: of this container, with an index of all frames.
        lasting: how long each sample lasts, `[samples]`.
        delays: how much later than decoded each sample is shown, but for a constant, `[samples]`.
        size: bytes of the file.

    Returns:
        None where the tables do not fit together.
    """
    entries = list(stream.index_entries)
    stamps = np.array([entry.timestamp for entry in entries], dtype=np.int64)
    is_whole = all(entry.size > 0 and not entry.is_discard and entry.pos + entry.size <= size for entry in entries)
    if not is_whole or can_hide_frames(stream) or not np.array_equal(np.diff(stamps), lasting[:-1]):
        return None
    first = next((packet for packet in container.demux(stream) if packet.size), None)
    if first is None or first.pts is None or first.dts is None or first.dts != stamps[0]:
        return None
    shown_at = stamps + delays + (first.pts - first.dts - int(delays[0]))
    columns = zip(shown_at.tolist(), stamps.tolist(), lasting.tolist(), entries, strict=True)
    marks = [Mark(pts, dts, duration, entry.is_keyframe, True) for pts, dts, duration, entry in columns]
    timeline = _timeline_of(marks, container, stream)
    return None if timeline.order is None else timeline


def _timeline_of(marks: list[Mark], container: InputContainer, stream: VideoStream) -> Timeline:
    order = None if _reorders_untold(container, stream) else _presentation_order(marks)
    if order is not None:
        ticks = [_tick(marks[place].pts, place) for place in order]
        last = marks[order[-1]].duration if order else 0
    else:
        # One frame comes out for each packet that goes in, so the times of decoding, sorted, are a delay off at most.
        ticks = sorted(_tick(mark.dts, place) for place, mark in enumerate(marks) if mark.is_shown)
        last = marks[-1].duration if marks else 0
    return Timeline(marks, order, *_seconds(ticks, last, stream))


def can_hide_frames(stream: VideoStream) -> bool:
    """Whether packets of this stream may hold frames that are for reference alone, unsaid by the container."""
    return stream.codec_context.name in ("vp8", "libvpx")


def mark_of(packet: Packet[VideoStream], hides_frames: bool) -> Mark:
    """What matters of a packet; `hides_frames` for VP8, whose first byte tells whether the frame is shown."""
    is_shown = not packet.is_discard and not (hides_frames and not memoryview(packet)[0] & _VP8_SHOWN)
    return Mark(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, is_shown)


def _reorders_untold(container: InputContainer, stream: VideoStream) -> bool:
    # AVI stores the order of decoding alone; FFmpeg's guess of the other one is wrong for H.264.
    return container.format.name == "avi" and stream.codec_context.has_b_frames


def _presentation_order(marks: list[Mark]) -> list[int] | None:
    shown = [(mark.pts, place) for place, mark in enumerate(marks) if mark.is_shown and mark.pts is not None]
    complete = len(shown) == sum(mark.is_shown for mark in marks)
    if not complete or len({pts for pts, _ in shown}) < len(shown):
        return None
    return [place for _, place in sorted(shown)]


def _tick(stamp: int | None, place: int) -> int:
    return place if stamp is None else stamp


def _seconds(ticks: list[int], last: int, stream: VideoStream) -> tuple[np.ndarray, float]:
    """Seconds of each frame from the first one, and of the end; `last` is how long the last one is shown, 0 unknown."""
    if not ticks or stream.time_base is None:
        return np.zeros(0), 0.0
    base = stream.time_base
    # Whole numbers up to the one division, so that a frame at 0.04 s has the float that 0.04 is read as.
    times = np.array([(tick - ticks[0]) * base.numerator / base.denominator for tick in ticks])
    rate = float(stream.average_rate or stream.guessed_rate or 1)
    return times, float(times[-1]) + (last * float(base) or 1 / rate)


def stretches(marks: list[Mark], order: list[int], numbers: Collection[int]) -> Iterator[Stretch]:
    """Group wanted frames by the key frame that their decoding starts from.

    Args:
        marks: as in `Timeline`.
        order: as in `Timeline`.
        numbers: wanted frames.

    Yields:
        Stretches in the order of decoding; no packet lies in two of them.
    """
    keys = [place for place, mark in enumerate(marks) if mark.is_key]
    groups: dict[int, Stretch] = {}
    for number in sorted(numbers):
        place = order[number]
        stamp = _tick(marks[place].pts, place)
        first = _start(marks, keys, place, stamp)
        group = groups.setdefault(first, Stretch(first, place, {}))
        groups[first] = group._replace(last=max(group.last, place))
        group.wanted[stamp] = number
    yield from _disjoint([groups[first] for first in sorted(groups)])


def needed_places(marks: list[Mark], stretch: Stretch) -> frozenset[int]:
    """Places of the packets of a stretch that its wanted frames may build on.

    Frames that are shown before the key frame but decoded after it build on others from before it, and no frame
    behind the key frame builds on them.

    Args:
        marks: as in `Timeline`.
        stretch: of these packets.
    """
    places = range(stretch.first, stretch.last + 1)
    start = _tick(marks[stretch.first].pts, stretch.first)
    if not marks[stretch.first].is_key:
        return frozenset(places)
    return frozenset(place for place in places if _tick(marks[place].pts, start) >= start)


def _start(marks: list[Mark], keys: list[int], place: int, stamp: int) -> int:
    """The last key frame that comes before a frame, both in decoding and on the screen."""
    before = [key for key in keys if key <= place and _tick(marks[key].pts, key) <= stamp]
    return before[-1] if before else 0


def _disjoint(groups: list[Stretch]) -> Iterator[Stretch]:
    """Join stretches that overlap, which happens where frames are shown before the key frame they follow."""
    joined: list[Stretch] = []
    for group in groups:
        if joined and group.first <= joined[-1].last:
            former = joined.pop()
            group = Stretch(former.first, max(former.last, group.last), former.wanted | group.wanted)
        joined.append(group)
    yield from joined
