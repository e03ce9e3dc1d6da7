"""What a video says of itself, and which of its frames a sample gets.

The rules are those of InternVL's `get_frame_indices`; the reading of files is in `frames.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ivl_lightning.data.locations import MediaError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER_RATE = 1.0
"""Frames per second of a folder of frames, which does not say; matters to `clip` and `fpsX` only."""

Clip = tuple[float, float]
"""Start and end in seconds; the frames with `start <= time < end`, counted from the first frame of the file."""


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What a video file says of itself before a frame is decoded.

    Attributes:
        width: pixels as stored.
        height: pixels as stored.
        frames: frames that are shown; with a clip, those of the clip.
        rate: frames per second, on average.
        duration: seconds; with a clip, those of the clip that the file covers.
    """

    width: int
    height: int
    frames: int
    rate: float
    duration: float


class Sampling(NamedTuple):
    """A way to choose frames. `fps` is frames per second, used by the kind `fps` only."""

    kind: Literal["rand", "middle", "fps"]
    fps: float = 0.0


def parse_sampling(text: str) -> Sampling:
    """Read `rand`, `middle` or `fpsX`.

    Args:
        text: `rand` takes a random frame of each of equal intervals, `middle` the center of each, `fps0.5` a frame
            every two seconds.

    Raises:
        ValueError: anything else.
    """
    if text == "rand":
        return Sampling("rand")
    if text == "middle":
        return Sampling("middle")
    match = re.fullmatch(r"fps(\d+(?:\.\d*)?|\.\d+)", text)
    if match is not None and 0 < float(match[1]) < math.inf:
        return Sampling("fps", float(match[1]))
    raise ValueError(
        f"frame sampling is {text!r}; choose 'rand' (random, for training), 'middle' (centers of equal intervals) or "
        "'fpsX' with X frames per second above 0, such as 'fps1' or 'fps0.5'"
    )


def frame_range(
    available: int, *, rate: float, duration: float, sampling: str, min_frames: int, max_frames: int
) -> tuple[int, int]:
    """Fewest and most frames that a sample may get.

    `rand` and `middle` draw uniformly from `min_frames` to `max_frames` and take what there is of it. `fpsX` has
    nothing to draw: one frame for each window of 1/X seconds whose center lies in the video.

    A video of 20 frames at 10 per second lasts 2 s. `rand` with 8 to 32 frames gives (8, 20). `fps2` has windows of
    0.5 s with centers 0.25, 0.75, 1.25 and 1.75 s, so (4, 4); with at most 3 frames (3, 3).

    Args:
        available: frames of the video, or of its clip.
        rate: frames per second.
        duration: seconds.
        sampling: see `parse_sampling`.
        min_frames: fewest frames; `fpsX` does not look at it.
        max_frames: most frames.

    Returns:
        `(lowest, highest)`, at least 1 and at most `max_frames`.

    Raises:
        ValueError: no frame, limits that cannot hold, an unknown sampling, or a rate or duration that is no number.
    """
    if not 1 <= min_frames <= max_frames:
        raise ValueError(
            f"min_frames is {min_frames} and max_frames is {max_frames}; choose 1 <= min_frames <= max_frames"
        )
    _check_video(available, rate)
    kind, fps = parse_sampling(sampling)
    if kind != "fps":
        return min(min_frames, available), min(max_frames, available)
    if not 0 <= duration < math.inf:
        raise ValueError(f"duration is {duration} s; it must be a number of seconds from 0")
    windows = min(math.ceil(duration * fps), max_frames)
    count = max(1, int((_window_centers(windows, rate, fps) < available).sum()))
    return count, count


def frame_indices(available: int, count: int, *, rate: float, sampling: str, rng: np.random.Generator) -> list[int]:
    """Choose frames by the official rules.

    Of 12 frames 4 make intervals [0, 3), [3, 6), [6, 9), [9, 12). `middle` takes their centers 1, 4, 7, 10. `rand`
    draws from each but never its last frame, so 0 or 1, 3 or 4, 6 or 7, 9 or 10. With 8 intervals some hold a single
    frame, so that nothing is left to draw from: then 8 different frames of all are drawn. `fps2` at 4 frames per
    second has centers at 0.25, 0.75, ... s, which are frames 1, 3, 5, 7.

    Args:
        available: frames of the video, or of its clip.
        count: frames wanted. Where there are fewer the last chosen one repeats.
        rate: frames per second; used by `fpsX` only.
        sampling: see `parse_sampling`.
        rng: the only source of randomness; used by `rand` only.

    Returns:
        `count` indices below `available`, rising.

    Raises:
        ValueError: no frame to choose from or to choose, an unknown sampling, or a rate that is no number.
    """
    if count < 1:
        raise ValueError(f"{count} frames were asked for; ask for at least 1")
    _check_video(available, rate)
    kind, fps = parse_sampling(sampling)
    if kind == "fps":
        return np.minimum(_window_centers(count, rate, fps), available - 1).astype(int).tolist()
    chosen = min(count, available)
    # In floating point, cut off: as the original, whose rounding decides a few borders.
    borders = np.linspace(0, available, chosen + 1).astype(int)
    starts, lasts = borders[:-1], borders[1:] - 1
    if kind == "middle":
        indices = (starts + lasts) // 2
    elif (starts < lasts).all():
        indices = rng.integers(starts, lasts)
    else:
        indices = np.sort(rng.permutation(available)[:chosen])
    return np.pad(indices, (0, count - chosen), mode="edge").tolist()


def _check_video(available: int, rate: float) -> None:
    if available < 1:
        raise ValueError(f"a video of {available} frames has none to choose; it must have at least 1")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate is {rate} frames per second; it must be a number above 0")


def _window_centers(windows: int, rate: float, fps: float) -> np.ndarray:
    """Frame numbers at the centers of windows of 1/fps seconds, rounded to even as by the original; may lie beyond."""
    return np.around((np.arange(windows) + 0.5) / fps * rate)


def check_clip(clip: Clip | None, path: str) -> None:
    """Refuse a clip that no video has.

    Args:
        clip: start and end in seconds, or None for the whole video.
        path: the video, for the message.

    Raises:
        MediaError: `clip_invalid`.
    """
    if clip is not None and not (len(clip) == 2 and 0 <= clip[0] < clip[1]):
        raise MediaError(
            "clip_invalid",
            f"the clip {list(clip)} of {shown(path)} is no span of time; write [start, end] in seconds with "
            "0 <= start < end",
        )


def clip_window(times: np.ndarray, clip: Clip | None, path: str) -> range:
    """Numbers of the frames that lie in a clip.

    Args:
        times: seconds from the first frame, rising, `[frames]`.
        clip: start and end in seconds, or None for all.
        path: the video, for the message.

    Raises:
        MediaError: `video_empty` if no frame lies in it.
    """
    start, end = (0, len(times)) if clip is None else (int(place) for place in np.searchsorted(times, clip))
    if start >= end:
        where = "" if clip is None else f" between {clip[0]} and {clip[1]} s; its last frame is shown at {_last(times)}"
        raise MediaError("video_empty", f"{shown(path)} has no frame{where}: correct the row or replace the file")
    return range(start, end)


def frame_numbers(times: np.ndarray, indices: Sequence[int], clip: Clip | None, path: str) -> list[int]:
    """Numbers in the whole video of frames that are counted from the start of a clip.

    Args:
        times: seconds from the first frame, rising, `[frames]`.
        indices: frame numbers inside of the clip.
        clip: start and end in seconds, or None for the whole video.
        path: the video, for messages.

    Raises:
        MediaError: `video_empty`, or `video_frame_missing` for an index beyond the end.
    """
    window = clip_window(times, clip, path)
    for index in indices:
        if not 0 <= index < len(window):
            raise MediaError(
                "video_frame_missing",
                f"{shown(path)} has {len(window)} frames{'' if clip is None else f' in the clip {list(clip)}'}, and "
                f"frame {index} was asked for; if the file was changed, build the index again",
            )
    return [window[index] for index in indices]


def _last(times: np.ndarray) -> str:
    return f"{times[-1]:.3f} s" if len(times) else "no time"


def clip_header(
    size: tuple[int, int], times: np.ndarray, end: float, rate: float | None, clip: Clip | None, path: str
) -> VideoHeader:
    """Header of a video, or of a clip of it, whose frames' times are known.

    Args:
        size: width and height in pixels.
        times: seconds from the first frame, rising, `[frames]`.
        end: seconds from the first frame to the end of the last one.
        rate: frames per second as the file says; taken where it fits the times.
        clip: start and end in seconds, or None for all.
        path: the video, for messages.

    Raises:
        MediaError: `video_empty`.
    """
    frames = len(clip_window(times, clip, path))
    start, stop = (0.0, end) if clip is None else (clip[0], min(clip[1], end))
    # A rate of the whole video: that of a clip of few frames would be rough.
    is_true = rate is not None and abs(rate * end - len(times)) < 1
    return VideoHeader(*size, frames, rate if rate and is_true else len(times) / end, duration=stop - start)
