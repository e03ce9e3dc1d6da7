"""Exactly the frames asked for, counted by header, in every container; sampling by the official rules."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl_lightning.data import frames
from ivl_lightning.data.animation import load_animation
from ivl_lightning.data.media import MediaError, MediaReader
from ivl_lightning.data.timeline import Mark, Timeline, mark_of, needed_places, stretches
from ivl_lightning.data.video import Sampling, frame_indices, frame_range, parse_sampling

av = pytest.importorskip("av")

WIDTH, HEIGHT, FRAMES, RATE = 64, 48, 40, 10


def picture(number: int) -> Image.Image:
    """Eight bars, black or white: the bits of a number, still to be read after lossy coding."""
    bits = np.array([number >> bit & 1 for bit in range(8)], dtype=np.uint8) * 255
    row = bits.repeat(WIDTH // 8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy())


def number_of(image: Image.Image) -> int:
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    bars = np.asarray(image.convert("L"))[8:-8].reshape(HEIGHT - 16, 8, WIDTH // 8)[:, :, 2:-2].mean(axis=(0, 2))
    return sum(1 << bit for bit, level in enumerate(bars) if level > 128)


def encode(
    kind: str, codec: str, *, b_frames: int = 0, codec_options: dict[str, str] | None = None, **options: str
) -> bytes:
    with NamedTemporaryFile() as file, av.open(file.name, "w", format=kind, container_options=options) as container:
        stream = container.add_stream(codec, rate=RATE, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, b_frames
        for number in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(number))))
        container.mux(stream.encode())
        container.close()
        return Path(file.name).read_bytes()


def animate(kind: str) -> bytes:
    buffer = BytesIO()
    first, *others = (picture(number) for number in range(FRAMES))
    first.save(buffer, kind, save_all=True, append_images=others, duration=1000 // RATE, lossless=True)
    return buffer.getvalue()


def cut_by_edit_list() -> bytes:
    """Frames 17 to 39 alone: the file begins at key frame 12 and hides what comes before 17."""
    buffer = BytesIO()
    with av.open(BytesIO(encode("mp4", "libx264", b_frames=3))) as source, av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        shift = sorted(packet.pts for packet in packets)[17]
        for packet in packets[12:]:
            packet.stream, packet.pts, packet.dts = stream, packet.pts - shift, packet.dts - shift
            target.mux(packet)
    return buffer.getvalue()


OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0:keyint=12"}
MAKERS: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: encode("mp4", "libx264", b_frames=3),
    "mp4_open_groups": lambda: encode("mp4", "libx264", codec_options=OPEN_GROUPS),
    "mp4_fragments": lambda: encode("mp4", "libx264", b_frames=3, movflags="frag_keyframe"),
    "mp4_index_first": lambda: encode("mp4", "libx264", b_frames=3, movflags="faststart"),
    "avi": lambda: encode("avi", "mpeg4"),
    "avi_b_frames": lambda: encode("avi", "mpeg4", b_frames=2),
    "avi_h264": lambda: encode("avi", "libx264", b_frames=3),
    "matroska": lambda: encode("matroska", "libx264", b_frames=3),
    "webm_vp8": lambda: encode("webm", "libvpx"),
    "webm_vp9": lambda: encode("webm", "libvpx-vp9", codec_options={"deadline": "realtime", "cpu-used": "8"}),
    "gif": lambda: animate("GIF"),
    "webp": lambda: animate("WEBP"),
}
FILES = sorted(MAKERS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, make in MAKERS.items():
        (folder / name).write_bytes(make())
    (folder / "frames").mkdir()
    for number in range(FRAMES):
        # Numbers from 5 on without leading zeros: sorted as text 10 would come before 9.
        picture(number).save(folder / "frames" / f"shot_{number + 5}.jpg")
    (folder / "frames" / "notes.txt").write_text("not a frame")
    return folder


@pytest.fixture
def reader(root: Path) -> MediaReader:
    return MediaReader(str(root))


def reason(action: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(MediaError) as caught:
        action(*arguments)
    return caught.value.reason


@pytest.mark.parametrize("name", FILES)
def test_header(reader: MediaReader, name: str) -> None:
    header = reader.video_header(name)
    assert (header.width, header.height, header.frames) == (WIDTH, HEIGHT, FRAMES)
    assert (header.rate, header.duration) == pytest.approx((RATE, FRAMES / RATE))


@pytest.mark.parametrize("name", FILES)
def test_any_frames_in_any_order(reader: MediaReader, name: str) -> None:
    """Frame i of the file is the i-th picture that was encoded, whichever frames are asked for with it."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, FRAMES):
        indices = rng.integers(0, FRAMES, count).tolist()
        assert [number_of(frame) for frame in reader.load_frames(name, indices)] == indices


@pytest.mark.parametrize("name", FILES)
def test_clip(reader: MediaReader, name: str) -> None:
    """At 10 frames per second 1.0 <= time < 2.0 are the frames 10 to 19, counted from 0 inside the clip."""
    header = reader.video_header(name, (1.0, 2.0))
    assert header.frames == 10
    assert (header.rate, header.duration) == pytest.approx((RATE, 1.0))
    assert [number_of(frame) for frame in reader.load_frames(name, [9, 0, 3], (1.0, 2.0))] == [19, 10, 13]
    assert reason(reader.load_frames, name, [10], (1.0, 2.0)) == "video_frame_missing"


@pytest.mark.parametrize("name", sorted(set(FILES) - {"avi_b_frames", "avi_h264", "gif", "webp"}))
def test_whole_files_are_not_decoded_from_the_start(
    reader: MediaReader, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Only AVI with reordered frames, whose time stamps are no guide, and damaged files are."""
    monkeypatch.setattr(frames, "_by_count", lambda *_: pytest.fail("decoded from the start"))
    assert [number_of(frame) for frame in reader.load_frames(name, [30, 2, 13])] == [30, 2, 13]


def marks(*stamps: int, keys: tuple[int, ...]) -> list[Mark]:
    """Packets in the order of decoding, told by when they are shown."""
    return [Mark(stamp, None, 1, place in keys, True) for place, stamp in enumerate(stamps)]


def test_stretches_by_hand() -> None:
    """Two groups of pictures, I P B B shown as 0 3 1 2; the second is open: 5 and 4 come before its key frame 6.

    Frame 2 needs packets 0 to 3. Frame 7 needs the key frame at place 4 and not the two packets behind it, frame 5
    needs all from the first key frame on; asked for together they are one stretch.
    """
    packets = marks(0, 3, 1, 2, 6, 4, 5, 7, keys=(0, 4))
    order = sorted(range(8), key=lambda place: packets[place].pts or 0)

    def plan(*numbers: int) -> list[tuple[int, int, set[int]]]:
        found = stretches(packets, order, numbers)
        return [(one.first, one.last, set(needed_places(packets, one))) for one in found]

    assert plan(2) == [(0, 3, {0, 1, 2, 3})]
    assert plan(7) == [(4, 7, {4, 7})]
    assert plan(2, 7) == [(0, 3, {0, 1, 2, 3}), (4, 7, {4, 7})]
    assert plan(5, 7) == [(0, 7, set(range(8)))]


def test_vp8_frames_for_reference_alone_are_not_counted() -> None:
    """Bit 4 of the first byte, RFC 6386."""
    assert mark_of(av.Packet(b"\x10"), hides_frames=True).is_shown
    assert not mark_of(av.Packet(b"\x00"), hides_frames=True).is_shown
    assert mark_of(av.Packet(b"\x00"), hides_frames=False).is_shown


@pytest.mark.parametrize("name", ["mp4", "mp4_open_groups", "mp4_index_first"])
def test_key_frames_are_jumped_to(reader: MediaReader, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Frame 30 alone: of the 40 packets those before its key frame are read in the first pass alone, if at all."""
    expected = [np.asarray(frame) for frame in reader.load_frames(name, range(FRAMES))]
    frames._timelines.clear()
    marked: list[int] = []

    def counted(packet: av.Packet, hides_frames: bool) -> Mark:
        marked.append(packet.size)
        return mark_of(packet, hides_frames)

    monkeypatch.setattr(frames, "mark_of", counted)
    (frame,) = reader.load_frames(name, [30])
    np.testing.assert_array_equal(np.asarray(frame), expected[30])
    assert 0 < len(marked) <= 20


@pytest.mark.parametrize("name", ["mp4", "mp4_open_groups", "mp4_index_first", "mpeg4", "h265", "vp9"])
def test_tables_tell_what_packets_tell(root: Path, tmp_path: Path, name: str) -> None:
    """All marks and times, without reading the packets."""
    makers = {
        "mpeg4": lambda: encode("mp4", "mpeg4", b_frames=2),
        "h265": lambda: encode("mp4", "libx265", codec_options={"x265-params": "log-level=none:keyint=12:bframes=4"}),
        "vp9": lambda: encode("mp4", "libvpx-vp9", codec_options={"cpu-used": "8", "lag-in-frames": "25"}),
    }
    (tmp_path / "film").write_bytes(makers[name]() if name in makers else (root / name).read_bytes())
    timelines = []
    for by_tables in (True, False):
        with (tmp_path / "film").open("rb") as file:
            video = frames._surveyed(file, "mp4", "film", 10**6, by_tables=by_tables)
        assert video is not None
        timelines.append(video.timeline)
    fast, full = timelines
    assert (fast.marks, fast.order, fast.end) == (full.marks, full.order, full.end)
    np.testing.assert_array_equal(fast.times, full.times)


@pytest.mark.parametrize("name", ["mp4", "mp4_open_groups", "mp4_index_first"])
def test_packets_are_not_read_through(reader: MediaReader, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    frames._timelines.clear()
    monkeypatch.setattr(frames, "read_timeline", lambda *_: pytest.fail("all packets were read"))
    assert [number_of(frame) for frame in reader.load_frames(name, [30, 2, 13])] == [30, 2, 13]


@pytest.mark.parametrize("name", ["mp4_fragments", "edit_list"])
def test_without_a_whole_index_packets_are_read(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "film").write_bytes(cut_by_edit_list() if name == "edit_list" else (root / name).read_bytes())
    with (tmp_path / "film").open("rb") as file:
        assert frames._surveyed(file, "mp4", "film", 10**6, by_tables=True) is None


def test_edit_lists_of_several_pieces_are_left_to_ffmpeg(root: Path, tmp_path: Path) -> None:
    """The one entry of a list is written twice: then sample i of the tables need not be packet i."""
    data = bytearray((root / "mp4").read_bytes())
    place = data.index(b"elst") - 4
    entry = data[place + 16 : place + 28]
    for name in (b"moov", b"trak", b"edts", b"elst"):
        start = data.index(name) - 4
        data[start : start + 4] = (int.from_bytes(data[start : start + 4], "big") + 12).to_bytes(4, "big")
    (tmp_path / "one.mp4").write_bytes((root / "mp4").read_bytes())
    data[place + 12 : place + 16] = (2).to_bytes(4, "big")
    data[place + 28 : place + 28] = entry
    (tmp_path / "two.mp4").write_bytes(data)
    with (tmp_path / "one.mp4").open("rb") as one, (tmp_path / "two.mp4").open("rb") as two:
        assert frames.mp4_sample_times(one, 1, FRAMES) is not None
        assert frames.mp4_sample_times(one, 1, FRAMES + 1) is None
        assert frames.mp4_sample_times(one, 2, FRAMES) is None
        assert frames.mp4_sample_times(two, 1, FRAMES) is None


def test_packets_unlike_the_tables_make_all_be_read(reader: MediaReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each packet that is decoded is compared with what the tables said of it."""
    tables, made = frames.mp4_sample_times, []
    read = frames.read_timeline

    def wrong(file: Any, track: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
        found = tables(file, track, samples)
        assert found is not None
        return found[0], found[1] + np.arange(samples)

    def counted(*arguments: Any) -> Timeline:
        made.append(1)
        return read(*arguments)

    frames._timelines.clear()
    monkeypatch.setattr(frames, "mp4_sample_times", wrong)
    monkeypatch.setattr(frames, "read_timeline", counted)
    monkeypatch.setattr(frames, "_by_count", lambda *_: pytest.fail("decoded from the start"))
    assert [number_of(frame) for frame in reader.load_frames("mp4", [30, 2, 13])] == [30, 2, 13]
    assert len(made) == 1


def test_a_jump_that_leads_elsewhere_costs_time_alone(reader: MediaReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by an index that is wrong: the file is read through instead, still from key frames."""
    seek = frames._Packets._approach

    def misled(self: Any, first: int) -> None:
        seek(self, first)
        if self.places and first:
            next(self.packets)

    monkeypatch.setattr(frames._Packets, "_approach", misled)
    monkeypatch.setattr(frames, "_by_count", lambda *_: pytest.fail("decoded from the start"))
    assert [number_of(frame) for frame in reader.load_frames("mp4", [30, 2, 13])] == [30, 2, 13]


def test_timelines_are_kept_while_a_file_stays_as_it_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips of one video share its first pass; a file that was replaced is read again."""
    made = []
    read = frames.read_timeline

    def counted(*arguments: Any) -> Timeline:
        made.append(1)
        return read(*arguments)

    monkeypatch.setattr(frames, "read_timeline", counted)
    reader = MediaReader(str(tmp_path))
    (tmp_path / "film").write_bytes((root / "mp4").read_bytes())
    reader.video_header("film", (0.0, 1.0))
    for start in (0.0, 1.0, 2.0):
        assert number_of(reader.load_frames("film", [1], (start, start + 1))[0]) == 10 * start + 1
    assert len(made) == 1
    (tmp_path / "film").write_bytes((root / "avi").read_bytes())
    assert number_of(reader.load_frames("film", [7])[0]) == 7
    assert len(made) == 2
    for number in range(5):
        (tmp_path / f"film{number}").write_bytes((root / "mp4").read_bytes())
        reader.load_frames(f"film{number}", [0])
    assert len(frames._timelines) <= 2


@pytest.mark.parametrize("name", ["mp4", "avi_h264", "gif", "webp", "frames"])
def test_frames_are_shrunk_one_by_one(reader: MediaReader, name: str) -> None:
    """`then` sees each frame once and at once, so that no more than one is held; what it raises is not the file's."""
    seen: list[Any] = []

    def shrink(image: Image.Image) -> list[int]:
        assert sum(one() is not None for one in seen) <= 1
        seen.append(weakref.ref(image))
        return [number_of(image)]

    kept = reader.load_frames(name, [7, 3, 7, 30], then=shrink)
    assert kept == [[7], [3], [7], [30]]
    assert kept[0] is kept[2]
    assert len(seen) == 3

    def fail(image: Image.Image) -> None:
        raise KeyError("a fault of the caller")

    with pytest.raises(KeyError, match="a fault of the caller"):
        reader.load_frames(name, [0], then=fail)


def test_gif_frames_stay_on_the_canvas_of_the_first(tmp_path: Path) -> None:
    """A later frame of 3000 x 3000 in a file whose head says 64 x 48: Pillow would enlarge the canvas."""
    large = BytesIO()
    Image.new("P", (3000, 3000)).save(large, "GIF")
    small = BytesIO()
    picture(0).convert("P").save(small, "GIF")

    def blocks(data: bytes) -> tuple[bytes, bytes]:
        head = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
        return data[:head], data[head:-1]

    head, image = blocks(small.getvalue())
    (tmp_path / "bomb.gif").write_bytes(head + image + blocks(large.getvalue())[1] + b";")
    reader = MediaReader(str(tmp_path), max_pixels=10_000)
    with pytest.raises(MediaError, match=r"frame 1 of .* reaches to 3000 x 3000 pixels, beyond the canvas of 64 x 48"):
        reader.video_header("bomb.gif")
    assert reason(reader.load_frames, "bomb.gif", [0]) == "video_undecodable"
    # Pillow takes blocks apart in its own way, so what it finds is looked at as well, before it is decoded.
    with (tmp_path / "bomb.gif").open("rb") as file, pytest.raises(MediaError, match="beyond the canvas"):
        load_animation(file, "gif", [1], "bomb.gif", lambda frame: frame)


def test_gif_ends_that_players_forgive(root: Path, tmp_path: Path) -> None:
    """Without the closing byte, or with zeros before it. Zeros in place of it are an end that was never fetched."""
    whole = (root / "gif").read_bytes()
    reader = MediaReader(str(tmp_path))
    for end in (b"", b"\0\0;"):
        (tmp_path / "film.gif").write_bytes(whole[:-1] + end)
        assert reader.video_header("film.gif").frames == FRAMES
        assert [number_of(frame) for frame in reader.load_frames("film.gif", [39, 3])] == [39, 3]
    for content in (whole[:-1] + b"\0\0", whole[:-2], whole[:-1] + whole[whole.index(b"!") :][:8]):
        (tmp_path / "film.gif").write_bytes(content)
        assert reason(reader.video_header, "film.gif") == "video_truncated"


def box(name: bytes, length: int) -> bytes:
    return (8 + length).to_bytes(4, "big") + name + bytes(length)


def test_mp4_boxes_that_are_not_known(root: Path, tmp_path: Path) -> None:
    """A box of unknown name before or behind, and bytes behind that are no box; a box that is known must be whole."""
    reader = MediaReader(str(tmp_path))
    whole = (root / "mp4").read_bytes()
    renamed = whole[:4] + b"jumb" + whole[8:]
    for content in (renamed, whole + box(b"jumb", 9), whole + b"bytes of some tool", whole + b"\0" * 30):
        (tmp_path / "film.mp4").write_bytes(content)
        assert [number_of(frame) for frame in reader.load_frames("film.mp4", [33, 2])] == [33, 2]
    (tmp_path / "film.mp4").write_bytes(whole + box(b"moof", 100)[:-1])
    assert reason(reader.load_frames, "film.mp4", [0]) == "video_truncated"
    (tmp_path / "film.mp4").write_bytes(renamed[:-1])
    assert reason(reader.load_frames, "film.mp4", [0]) == "video_truncated"


def test_mp4_of_very_many_boxes(tmp_path: Path) -> None:
    """2 million boxes of 8 bytes: refused after 100,000, with none of them kept."""
    (tmp_path / "boxes.mp4").write_bytes(box(b"free", 0) * 2_000_000)
    tracemalloc.start()
    with pytest.raises(MediaError, match="more than 100000 boxes"):
        MediaReader(str(tmp_path)).video_header("boxes.mp4")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    """Two recordings of different sizes, one behind the other in one stream."""
    with av.open(str(tmp_path / "film.mkv"), "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for number in range(6):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height = (WIDTH, HEIGHT) if number < 3 else (2 * WIDTH, HEIGHT)
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, RATE)
            frame = av.VideoFrame.from_image(picture(number).resize((encoder.width, HEIGHT))).reformat(
                format="yuvj420p"
            )
            frame.pts = number
            for packet in encoder.encode(frame):
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, RATE)
                container.mux(packet)
    reader = MediaReader(str(tmp_path))
    assert number_of(reader.load_frames("film.mkv", [2])[0]) == 2
    with pytest.raises(MediaError, match="frames of 64 x 48 and of 128 x 48 pixels") as caught:
        reader.load_frames("film.mkv", [4])
    assert caught.value.reason == "video_undecodable"


def test_clip_beyond_the_end_is_cut_to_it(reader: MediaReader) -> None:
    header = reader.video_header("mp4", (3.5, 100.0))
    assert (header.frames, header.duration) == (5, 0.5)
    assert reason(reader.video_header, "mp4", (4.0, 5.0)) == "video_empty"
    assert reason(reader.load_frames, "mp4", [0], (4.0, 5.0)) == "video_empty"


@pytest.mark.parametrize("clip", [(2.0, 2.0), (3.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
@pytest.mark.parametrize("name", ["mp4", "frames"])
def test_clips_that_are_none(reader: MediaReader, name: str, clip: tuple[float, float]) -> None:
    assert reason(reader.video_header, name, clip) == "clip_invalid"
    assert reason(reader.load_frames, name, [0], clip) == "clip_invalid"


def test_folder_of_frames(reader: MediaReader) -> None:
    """Sorted by number; one frame per second."""
    header = reader.video_header("frames")
    assert (header.width, header.height, header.frames, header.rate, header.duration) == (64, 48, FRAMES, 1.0, 40.0)
    assert [number_of(frame) for frame in reader.load_frames("frames", [39, 0, 5, 0])] == [39, 0, 5, 0]
    assert reader.video_header("frames/", (10.0, 12.5)).frames == 3
    assert [number_of(frame) for frame in reader.load_frames("frames", [0, 2], (10.0, 12.5))] == [10, 12]
    assert reason(reader.load_frames, "frames", [FRAMES]) == "video_frame_missing"


def test_folder_faults(tmp_path: Path) -> None:
    reader = MediaReader(str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert reason(reader.video_header, "empty") == "video_empty"
    (tmp_path / "mac").mkdir()
    picture(9).save(tmp_path / "mac" / "a_1.png")
    (tmp_path / "mac" / "._a_1.png").write_bytes(b"what macOS keeps of a file beside it")
    assert [number_of(frame) for frame in reader.load_frames("mac", [0])] == [9]
    (tmp_path / "mixed").mkdir()
    picture(0).save(tmp_path / "mixed" / "a_1.png")
    picture(0).save(tmp_path / "mixed" / "cover.png")
    assert reason(reader.video_header, "mixed") == "video_frame_name"
    (tmp_path / "mixed" / "cover.png").rename(tmp_path / "mixed" / "b_01.png")
    assert reason(reader.load_frames, "mixed", [0]) == "video_frame_name"
    (tmp_path / "mixed" / "b_01.png").unlink()
    (tmp_path / "mixed" / "a_2.png").write_bytes(b"")
    assert reader.video_header("mixed").frames == 2
    assert reason(reader.load_frames, "mixed", [0, 1]) == "image_empty"


def test_frames_cannot_leave_root(tmp_path: Path) -> None:
    """A frame that is a link to outside is refused, as are a video and a folder there."""
    (tmp_path / "root" / "frames").mkdir(parents=True)
    picture(0).save(tmp_path / "secret_1.png")
    (tmp_path / "root" / "frames" / "a_1.png").symlink_to(tmp_path / "secret_1.png")
    reader = MediaReader(str(tmp_path / "root"))
    for path in ("frames", "../secret_1.png", ".."):
        assert reason(reader.video_header, path) == "path_escape"
        assert reason(reader.load_frames, path, [0]) == "path_escape"


def test_edit_list_hides_frames(tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(cut_by_edit_list())
    reader = MediaReader(str(tmp_path))
    assert reader.video_header("cut.mp4").frames == 23
    assert [number_of(frame) for frame in reader.load_frames("cut.mp4", [0, 1, 22])] == [17, 18, 39]


def test_rotated_video_is_shown_upright(tmp_path: Path) -> None:
    """A phone held upright stores frames lying down and a turn of 90 degrees."""
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)
        left_white = np.zeros((32, 64, 3), dtype=np.uint8)
        left_white[:, :32] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(left_white)))
        container.mux(stream.encode())
    frame = np.asarray(MediaReader(str(tmp_path)).load_frames("phone.mp4", [0])[0])
    assert frame.shape == (64, 32, 3)
    assert (frame[60].mean() > 200, frame[4].mean() < 50) == (True, True)


@pytest.mark.parametrize("name", FILES)
def test_cut_files_are_refused(root: Path, tmp_path: Path, name: str) -> None:
    """Wherever a file ends too early, there is an error with a reason and never another frame.

    A GIF that lacks its closing byte alone is whole.
    """
    whole = (root / name).read_bytes()
    reader = MediaReader(str(tmp_path))
    for length in np.linspace(1, len(whole) - (2 if name == "gif" else 1), 12, dtype=int):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert reason(reader.load_frames, "cut", [0]) in ("video_truncated", "video_undecodable")
        assert reason(reader.video_header, "cut") in ("video_truncated", "video_undecodable")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FILES), st.integers(0), st.binary(min_size=1, max_size=40), st.integers(0, FRAMES - 1))
def test_damaged_files_raise_media_errors_only(root: Path, name: str, place: int, patch: bytes, index: int) -> None:
    data = bytearray((root / name).read_bytes())
    start = place % len(data)
    data[start : start + len(patch)] = patch
    folder = root / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "damaged").write_bytes(data)
    reader = MediaReader(str(folder), max_pixels=10**6)
    with suppress(MediaError):
        header = reader.video_header("damaged")
        assert len(reader.load_frames("damaged", [index % header.frames])) == 1


def test_damage_inside_a_frame_is_not_painted_over(root: Path, tmp_path: Path) -> None:
    """FFmpeg fills damaged blocks from their surroundings and goes on; frames that build on them are refused too."""
    data = bytearray((root / "avi").read_bytes())
    with av.open(str(root / "avi")) as container:
        packet = bytes(list(container.demux(video=0))[24])
    start, half = data.index(packet), len(packet) // 2
    data[start + half : start + 2 * half] = b"\x55" * half
    (tmp_path / "damaged.avi").write_bytes(data)
    reader = MediaReader(str(tmp_path))
    assert reader.video_header("damaged.avi").frames == FRAMES
    assert number_of(reader.load_frames("damaged.avi", [23])[0]) == 23
    assert reason(reader.load_frames, "damaged.avi", [24]) == "video_undecodable"
    assert reason(reader.load_frames, "damaged.avi", [30]) == "video_undecodable"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "video_empty"),
        (b"a text that is called a video", "video_undecodable"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "video_undecodable"),
        (b"ffconcat version 1.0\nfile secret.mp4\n", "video_undecodable"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2", "video_truncated"),
        (b"RIFF\x04\x00\x00\x00AVI ", "video_undecodable"),
    ],
)
def test_files_that_are_no_videos(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "film.mp4").write_bytes(content)
    reader = MediaReader(str(tmp_path))
    assert reason(reader.video_header, "film.mp4") == expected
    assert reason(reader.load_frames, "film.mp4", [0]) == expected


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        MediaReader(str(tmp_path)).video_header("sound.mp4")


@pytest.mark.parametrize("name", ["mp4", "avi", "webm_vp9", "gif", "webp"])
def test_pixel_limit(root: Path, name: str) -> None:
    reader = MediaReader(str(root), max_pixels=WIDTH * HEIGHT - 1)
    assert reason(reader.video_header, name) == "video_too_large"
    assert reason(reader.load_frames, name, [0]) == "video_too_large"


def test_missing_file_and_wrong_indices(reader: MediaReader) -> None:
    assert reason(reader.video_header, "none.mp4") == "file_missing"
    assert reason(reader.load_frames, "none.mp4", [0]) == "file_missing"
    for index in (-1, FRAMES):
        assert reason(reader.load_frames, "mp4", [index]) == "video_frame_missing"
    assert reader.load_frames("mp4", []) == []


def test_missing_pyav_is_no_fault_of_the_row(root: Path) -> None:
    """Without the extra pictures and animations are read still, and a video stops the run with advice."""
    program = (
        "import sys; sys.modules['av'] = None\n"
        "from ivl_lightning.data.media import MediaReader, MediaError\n"
        f"reader = MediaReader({str(root)!r})\n"
        "assert reader.video_header('gif').frames == 40\n"
        "try:\n    reader.video_header('mp4')\n"
        "except ValueError as error:\n    assert not isinstance(error, MediaError); print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install 'ivl-lightning[video]'" in printed


def test_sampling_names() -> None:
    assert parse_sampling("rand") == Sampling("rand")
    assert parse_sampling("middle") == Sampling("middle")
    assert parse_sampling("fps0.5") == Sampling("fps", 0.5)
    assert parse_sampling("fps2") == Sampling("fps", 2.0)
    for text in ("", "random", "fps", "fps0", "fps-1", "fpsinf", "fpsnan", "fps1e3", "FPS1", " rand"):
        with pytest.raises(ValueError, match="choose 'rand'"):
            parse_sampling(text)


def chosen(available: int, count: int, sampling: str, rate: float = 10.0, seed: int = 0) -> list[int]:
    return frame_indices(available, count, rate=rate, sampling=sampling, rng=np.random.default_rng(seed))


def test_middle_by_hand() -> None:
    """12 frames in 4: [0, 2], [3, 5], ... with centers 1, 4, 7, 10. 10 in 4: borders 0, 2, 5, 7, 10, so 0, 3, 5, 8."""
    assert chosen(12, 4, "middle") == [1, 4, 7, 10]
    assert chosen(10, 4, "middle") == [0, 3, 5, 8]
    assert chosen(3, 3, "middle") == [0, 1, 2]


def test_fps_by_hand() -> None:
    """fps2 at 4 frames per second: centers 0.25, 0.75 s, ... are frames 1, 3, ...; fps4: 0.5, 1.5, 2.5 to the even."""
    assert chosen(9, 4, "fps2", rate=4.0) == [1, 3, 5, 7]
    assert chosen(9, 4, "fps4", rate=4.0) == [0, 2, 2, 4]


def test_random_stays_in_its_intervals_and_reaches_all_of_them() -> None:
    """Never the last frame of an interval: of [0, 3) frames 0 and 1 alone, as the original."""
    drawn = np.array([chosen(12, 4, "rand", seed=seed) for seed in range(200)])
    for number, start in enumerate((0, 3, 6, 9)):
        assert set(drawn[:, number]) == {start, start + 1}
    assert len({tuple(row) for row in drawn.tolist()}) == 16


def test_random_without_room_draws_different_frames() -> None:
    """8 intervals of 12 frames are too narrow: 8 different frames, anywhere."""
    drawn = [chosen(12, 8, "rand", seed=seed) for seed in range(200)]
    assert all(row == sorted(set(row)) for row in drawn)
    assert {index for row in drawn for index in row} == set(range(12))


def test_too_few_frames_repeat_the_last() -> None:
    assert chosen(3, 5, "rand") == [0, 1, 2, 2, 2]
    assert chosen(3, 5, "middle") == [0, 1, 2, 2, 2]
    assert chosen(3, 4, "fps5", rate=10.0) == [1, 2, 2, 2]


@settings(deadline=None)
@given(
    st.integers(1, 500),
    st.integers(1, 64),
    st.floats(0.1, 120),
    st.sampled_from(["rand", "middle", "fps0.3", "fps1", "fps7"]),
    st.integers(0, 2**32),
)
def test_indices_hold_what_they_promise(available: int, count: int, rate: float, sampling: str, seed: int) -> None:
    indices = chosen(available, count, sampling, rate, seed)
    assert len(indices) == count
    assert indices == sorted(indices)
    assert indices[0] >= 0
    assert indices[-1] < available
    assert indices == chosen(available, count, sampling, rate, seed)
    assert all(type(index) is int for index in indices)


def test_range_by_hand() -> None:
    def limits(available: int, sampling: str, rate: float = 10.0, most: int = 32) -> tuple[int, int]:
        duration = available / rate
        return frame_range(available, rate=rate, duration=duration, sampling=sampling, min_frames=8, max_frames=most)

    assert limits(100, "rand") == limits(100, "middle") == (8, 32)
    assert limits(20, "rand") == (8, 20)
    assert limits(3, "middle") == (3, 3)
    assert limits(20, "fps2") == (4, 4)
    assert limits(200, "fps2") == (32, 32)
    # 2.3 s in windows of 0.5 s: the fifth has its center, 2.25 s, at frame 22 of 23; at 2.2 s there is no frame 22.
    assert limits(23, "fps2") == (5, 5)
    assert limits(22, "fps2") == (4, 4)
    assert limits(1, "fps1") == (1, 1)


@given(st.integers(1, 3000), st.floats(1, 120), st.sampled_from(["fps0.25", "fps1", "fps2", "fps24"]))
def test_fps_range_is_what_the_original_keeps(available: int, rate: float, sampling: str) -> None:
    """The original lists the centers and drops those beyond the last frame."""
    fps = float(sampling[3:])
    gap, duration = 1 / fps, available / rate
    seconds = np.arange(gap / 2, duration + gap / 2, gap)
    kept = [int(frame) for frame in np.around(seconds * rate) if frame < available][:32]
    lowest, highest = frame_range(
        available, rate=rate, duration=duration, sampling=sampling, min_frames=8, max_frames=32
    )
    assert lowest == highest
    assert abs(lowest - max(1, len(kept))) <= 1
    if lowest == len(kept):
        np.testing.assert_allclose(chosen(available, lowest, sampling, rate), kept, atol=1)


def test_bad_arguments_are_named() -> None:
    good = {"rate": 10.0, "duration": 2.0, "sampling": "rand", "min_frames": 8, "max_frames": 32}
    for change, text in (
        ({"min_frames": 0}, "min_frames is 0"),
        ({"max_frames": 4}, "min_frames is 8 and max_frames is 4"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"duration": math.nan, "sampling": "fps1"}, "duration is nan"),
    ):
        with pytest.raises(ValueError, match=text):
            frame_range(20, **(good | change))
    with pytest.raises(ValueError, match="0 frames"):
        frame_range(0, **good)
    with pytest.raises(ValueError, match="0 frames were asked for"):
        chosen(10, 0, "rand")
