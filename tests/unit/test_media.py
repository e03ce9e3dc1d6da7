"""Media paths stay below root; broken images are refused with a reason; sizes come from the header alone."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from ivl_lightning.data import media, storage
from ivl_lightning.data.media import MediaError, MediaReader

FAULTS = Path(__file__).parents[1] / "fixtures" / "faults"
TILING = Path(__file__).parents[1] / "fixtures" / "tiling"


def media_rows() -> list[Any]:
    rows = json.loads((FAULTS / "expected.json").read_text())["rows"]
    chosen = [row for row in rows if row["dataset"] in ("files", "paths")]
    return [pytest.param(row, id=f"{row['id']}-{row['kind']}") for row in chosen]


def picture(size: tuple[int, int] = (20, 10)) -> Image.Image:
    width, height = size
    values = np.arange(width * height * 3, dtype=np.uint32) * 7 % 251
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))


def encoded(image: Image.Image, kind: str, exif: Image.Exif | bytes = b"") -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = Path(os.path.realpath(tmp_path)) / "root"
    (folder / "img").mkdir(parents=True)
    picture().save(folder / "img" / "ok.png")
    return folder


@pytest.fixture
def bucket() -> Iterator[str]:
    """A store behind fsspec, in memory."""
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/data/ok.png", encoded(picture(), "PNG"))
    store.pipe("/bucket/secret.png", encoded(picture(), "PNG"))
    yield "memory://bucket/data"
    store.rm("/bucket", recursive=True)


def reason(reader: MediaReader, path: str) -> str:
    with pytest.raises(MediaError) as caught:
        reader.load_image(path)
    return caught.value.reason


@pytest.mark.parametrize("expected", media_rows())
def test_recorded_faults(expected: dict[str, Any]) -> None:
    lines = (FAULTS / f"{expected['dataset']}.jsonl").read_text().splitlines()
    row = json.loads(lines[expected["line"] - 1])
    reader = MediaReader(str(FAULTS / "data"))
    if expected["expected"] == "accept":
        assert reader.load_image(row["image"]).size == reader.image_size(row["image"])
    else:
        assert reason(reader, row["image"]) == expected["reason"]


def test_header_refuses_a_bomb_before_pixels_are_allocated(root: Path) -> None:
    """The limit is on width * height of the header, one pixel more is too much."""
    assert MediaReader(str(root), max_pixels=200).load_image("img/ok.png").size == (20, 10)
    with pytest.raises(MediaError, match=r"20 x 10 = 200 pixels.*data\.max_pixels=199") as caught:
        MediaReader(str(root), max_pixels=199).image_size("img/ok.png")
    assert caught.value.reason == "image_too_large"


def test_bomb_warning_as_error_is_a_reason_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(MediaReader(str(FAULTS / "data")), "img/bomb_header.png") == "image_too_large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_cut_files_are_never_accepted(root: Path, kind: str) -> None:
    """Wherever a file is cut, it is refused with a reason of its own; nothing else is raised."""
    whole = encoded(picture((64, 48)), kind)
    for length in np.linspace(1, len(whole) * 0.9, 40, dtype=int):
        (root / "cut").write_bytes(whole[:length])
        assert reason(MediaReader(str(root)), "cut") in ("image_truncated", "image_undecodable")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]), st.lists(st.tuples(st.integers(0), st.binary())))
def test_damaged_files_raise_media_errors_only(
    tmp_path_factory: pytest.TempPathFactory, kind: str, damages: list[tuple[int, bytes]]
) -> None:
    """Bytes overwritten anywhere: decoders fail in many ways, and each becomes a reason."""
    data = bytearray(encoded(picture((40, 30)), kind))
    for place, patch in damages:
        start = place % len(data)
        data[start : start + len(patch)] = patch
    folder = tmp_path_factory.getbasetemp()
    (folder / "damaged").write_bytes(data)
    with suppress(MediaError):
        MediaReader(str(folder), max_pixels=10**6, exif_transpose=True).load_image("damaged")


def test_pillow_told_to_fill_truncated_images_is_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is True"):
        MediaReader(str(root)).load_image("img/ok.png")


def test_postscript_is_not_handed_to_an_outside_program(root: Path) -> None:
    (root / "page.jpg").write_bytes(encoded(picture(), "EPS"))
    assert reason(MediaReader(str(root)), "page.jpg") == "image_undecodable"


def test_folder_pipe_and_overlong_name_do_not_hang(root: Path) -> None:
    os.mkfifo(root / "pipe")
    reader = MediaReader(str(root))
    assert [reason(reader, path) for path in ("img", ".", "pipe", "x" * 5000)] == ["file_unreadable"] * 4
    assert reason(reader, "img/ok.png/more") == "file_missing"


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENFILE, "Too many open files in system"), "fs.file-max"),
        (OSError(errno.ENOSPC, "No space left on device"), "TMPDIR"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (MemoryError(), "memory"),
    ],
)
def test_faults_of_the_machine_are_no_faults_of_rows(
    root: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, advice: str
) -> None:
    """Not in opening, not in decoding, and not when a client has wrapped them: the run ends with advice."""
    (root / "film.gif").write_bytes(encoded(picture(), "GIF"))

    def plain(*_: object, **__: object) -> None:
        raise fault

    def wrapped(*_: object, **__: object) -> None:
        raise RuntimeError("a client's own error") from fault

    for raised in (plain, wrapped):
        for module, name in ((media, "open_location"), (Image, "open")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, raised)
                with pytest.raises(OSError, match=f"is not at fault.*{advice}"):
                    MediaReader(str(root)).load_image("img/ok.png")
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", raised)
            with pytest.raises(OSError, match=f"is not at fault.*{advice}"):
                MediaReader(str(root)).load_frames("film.gif", [0])


def test_faults_of_the_connection_are_told_from_those_of_the_file(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients raise errors of their own, which look like a decoder's; those are tried again by `data.retries`."""

    class ClientError(Exception):
        pass

    reader = MediaReader(bucket, allowed_schemes=("memory",))
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/data/film.gif", encoded(picture(), "GIF"))
    read = type(store.open("/bucket/data/ok.png")).read

    def broken(self: Any, *arguments: int) -> bytes:
        if self.tell() > 0:
            raise ClientError("Connection reset by peer")
        return bytes(read(self, *arguments))

    monkeypatch.setattr(type(store.open("/bucket/data/ok.png")), "read", broken)
    assert reason(reader, "ok.png") == "file_unreadable"
    with pytest.raises(MediaError, match="Connection reset") as caught:
        reader.video_header("film.gif")
    assert caught.value.reason == "file_unreadable"


def test_schemes_nobody_knows_end_the_run(root: Path) -> None:
    with pytest.raises(ValueError, match="'s4', which fsspec does not know") as caught:
        MediaReader(str(root), allowed_schemes=("s4",)).load_image("s4://bucket/x.png")
    assert not isinstance(caught.value, MediaError)


@contextmanager
def web_server(answer: Callable[[str], tuple[int, str, bytes]]) -> Iterator[str]:
    """Serves GET and HEAD; `answer` gives status, address to go on to, and content."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, location, content = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if location:
                self.send_header("Location", location)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/root"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_web_servers_cannot_lead_out_of_root() -> None:
    pytest.importorskip("aiohttp")
    content = encoded(picture(), "PNG")

    def answer(path: str) -> tuple[int, str, bytes]:
        if path == "/root/ok.png":
            return 200, "", content
        return (404, "", b"") if path == "/root/none.png" else (302, "/root/ok.png", b"over there")

    with web_server(answer) as root:
        reader = MediaReader(root, allowed_schemes=("http",))
        assert reader.load_image("ok.png").size == (20, 10)
        assert reason(reader, "none.png") == "file_missing"
        with pytest.raises(MediaError, match=r"/root/a\.png leads on to /root/ok\.png") as caught:
            reader.load_image("a.png")
        assert caught.value.reason == "path_escape"
        with pytest.raises(MediaError) as caught:
            reader.load_frames("a.gif", [0])
        assert caught.value.reason == "path_escape"


def test_own_settings_for_web_servers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a password, which fsspec would replace by the settings that are given in the program."""
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"trust_env": True}})
    assert storage._options("https")["client_kwargs"]["trust_env"] is True


@pytest.mark.parametrize("kind", ["lossy", "lossless", "alpha", "exif", "animated"])
def test_remote_webp_headers_cost_few_bytes(bucket: str, kind: str) -> None:
    """Pillow fetches the file whole; what is read here of its first bytes, and of EXIF behind, equals what it says."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8))
    options: dict[str, dict[str, Any]] = {
        "lossless": {"lossless": True},
        "exif": {"exif": with_orientation(6)},
        "animated": {"save_all": True, "append_images": [noise.rotate(180)]},
    }
    buffer = BytesIO()
    (noise.convert("RGBA") if kind == "alpha" else noise).save(buffer, "WEBP", **options.get(kind, {}))
    with Image.open(buffer) as image:
        expected = (*image.size, image.mode)
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/data/a.webp", buffer.getvalue())
    reader = MediaReader(bucket, allowed_schemes=("memory",), exif_transpose=True)
    fetched: list[int] = []
    file_type = type(store.open("/bucket/data/ok.png"))
    read = file_type.read

    def counted(self: Any, *arguments: int) -> bytes:
        data = bytes(read(self, *arguments))
        fetched.append(len(data))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_type, "read", counted)
        header = reader.header("a.webp")
    assert (header.width, header.height, header.mode) == expected
    assert header.orientation == (6 if kind == "exif" else 1)
    assert sum(fetched) < 200
    assert reader.image_size("a.webp") == reader.load_image("a.webp").size
    with pytest.raises(MediaError) as caught:
        MediaReader(bucket, allowed_schemes=("memory",), max_pixels=401 * 300 - 1).header("a.webp")
    assert caught.value.reason == "image_too_large"


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800.png"])
def test_texts_that_are_no_paths(root: Path, path: str) -> None:
    assert reason(MediaReader(str(root)), path) == "path_invalid"


def test_paths_inside_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, absolute and roundabout spellings of a file below root are that file."""
    expected = str(root / "img" / "ok.png")
    reader = MediaReader(str(root))
    for path in ("img/ok.png", "./img//ok.png", "img/../img/ok.png", "../root/img/ok.png", expected):
        assert reader.resolve(path) == expected
    monkeypatch.chdir(root.parent)
    assert MediaReader("root").resolve("img/ok.png") == expected


@pytest.mark.parametrize("path", ["..", "../x.png", "img/../../x.png", "/etc/passwd", "../root2/x.png", "~/../../.."])
def test_paths_outside_root(root: Path, path: str) -> None:
    assert reason(MediaReader(str(root)), path) == "path_escape"
    assert reason(MediaReader(str(root), follow_symlinks=True), path) == "path_escape"


PART = st.sampled_from(["..", ".", "", "root", "a", "b c"])


@given(st.lists(PART, min_size=1, max_size=8))
def test_resolution_equals_a_walk(parts: list[str]) -> None:
    """A path is inside iff walking its parts from /nowhere/root ends at or below /nowhere/root."""
    place = ["nowhere", "root"]
    for part in parts:
        if part == "..":
            place = place[:-1]
        elif part not in ("", "."):
            place = [*place, part]
    path = "/".join(parts)
    reader = MediaReader("/nowhere/root")
    if path.startswith("/") or not path:
        path = f"./{path}"
    if place[:2] == ["nowhere", "root"]:
        assert reader.resolve(path) == "/" + "/".join(place)
    else:
        assert reason(reader, path) == "path_escape"


def test_links_out_of_root_need_the_switch(root: Path) -> None:
    picture().save(root.parent / "outside.png")
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "folder").symlink_to(root.parent)
    for path in ("link.png", "folder/outside.png"):
        with pytest.raises(MediaError, match=r"data\.follow_symlinks=true") as caught:
            MediaReader(str(root)).resolve(path)
        assert caught.value.reason == "path_escape"
        assert MediaReader(str(root), follow_symlinks=True).load_image(path).size == (20, 10)


def test_links_within_root_and_a_linked_root(root: Path) -> None:
    (root / "same.png").symlink_to(root / "img" / "ok.png")
    (root.parent / "alias").symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    alias = MediaReader(str(root.parent / "alias"))
    for path in ("same.png", str(root / "same.png"), str(root.parent / "alias" / "same.png")):
        assert alias.load_image(path).size == (20, 10)
    assert reason(alias, "loop") == "file_unreadable"


@pytest.mark.parametrize(
    "path", ["http://a.invalid/x.png", "S3://b/x", "simplecache::http://a.invalid/x", "file:///etc/passwd", "data:x"]
)
def test_schemes_are_closed_by_default(root: Path, path: str) -> None:
    assert reason(MediaReader(str(root)), path) == "path_scheme"


def test_allowed_scheme_is_read(root: Path, bucket: str) -> None:
    reader = MediaReader(str(root), allowed_schemes=("memory",))
    assert reader.load_image(f"{bucket}/ok.png").size == (20, 10)
    assert reason(reader, f"{bucket}/none.png") == "file_missing"


def test_remote_root(bucket: str) -> None:
    """Under a remote root relative paths and URLs below it are read; everything beside it is refused."""
    reader = MediaReader(bucket, allowed_schemes=("memory",))
    assert reader.resolve("ok.png") == f"{bucket}/ok.png"
    assert reader.image_size("ok.png") == reader.image_size(f"{bucket}/ok.png") == (20, 10)
    outside = ["../secret.png", "%2e%2e/secret.png", "/bucket/secret.png", "memory://bucket/secret.png", f"{bucket}2/x"]
    assert [reason(reader, path) for path in outside] == ["path_escape"] * 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"root": "s3://bucket"}, "data.allowed_schemes"),
        ({"root": ".", "allowed_schemes": "s3"}, "write a list"),
        ({"root": ".", "allowed_schemes": ("file",)}, "'file'"),
        ({"root": ".", "allowed_schemes": ("s3://",)}, "bare name"),
        ({"root": ".", "max_pixels": 0}, "at least 1"),
        ({"root": ".", "max_pixels": 10**12}, "MAX_IMAGE_PIXELS"),
        ({"root": ".", "gray16": "stretch"}, "'clip'"),
    ],
)
def test_settings_that_cannot_hold(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MediaReader(**arguments)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_header_size_is_the_size_of_the_loaded_image(root: Path, kind: str, orientation: int) -> None:
    """With and without the EXIF switch; Pillow itself turns TIFF upright."""
    (root / "turned").write_bytes(encoded(picture(), kind, exif=with_orientation(orientation)))
    for switch in (False, True):
        reader = MediaReader(str(root), exif_transpose=switch)
        sideways = orientation >= 5 and (switch or kind == "TIFF")
        assert reader.image_size("turned") == ((10, 20) if sideways else (20, 10))
        assert reader.load_image("turned").size == reader.image_size("turned")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_equals_pillows_own(root: Path, orientation: int) -> None:
    (root / "turned.png").write_bytes(encoded(picture(), "PNG", exif=with_orientation(orientation)))
    with Image.open(root / "turned.png") as image:
        expected = ImageOps.exif_transpose(image).tobytes()
    assert MediaReader(str(root), exif_transpose=True).load_image("turned.png").tobytes() == expected


def test_broken_exif_matters_only_where_it_is_used(root: Path) -> None:
    (root / "exif.png").write_bytes(encoded(picture(), "PNG", exif=b"not a TIFF block"))
    assert MediaReader(str(root)).load_image("exif.png").size == (20, 10)
    assert MediaReader(str(root)).header("exif.png").orientation == 0
    assert reason(MediaReader(str(root), exif_transpose=True), "exif.png") == "exif_invalid"


def test_gray16_clips_as_the_original_or_scales(root: Path) -> None:
    """clip: min(v, 255); scale: v / 257, so that 65535 becomes 255."""
    Image.fromarray(np.array([[0, 200, 257, 65535]], dtype=np.uint16)).save(root / "deep.png")
    levels = {
        gray16: np.asarray(MediaReader(str(root), gray16=gray16).load_image("deep.png"))[0, :, 0].tolist()
        for gray16 in ("clip", "scale")
    }
    assert levels == {"clip": [0, 200, 255, 255], "scale": [0, 1, 1, 255]}
    assert MediaReader(str(root)).header("deep.png").mode.startswith("I;16")


@pytest.mark.parametrize("highest", [65535, 1000])
def test_gray16_of_pgm(root: Path, highest: int) -> None:
    """Pillow brings the values to 65535 in a wider mode; of 32-bit TIFF files the range is not known."""
    (root / "a.pgm").write_bytes(b"P5\n3 1\n%d\n" % highest + np.array([0, highest // 2, highest], ">u2").tobytes())
    Image.fromarray(np.array([[0, 200, 65535]], dtype=np.int32)).save(root / "a.tif")
    reader = MediaReader(str(root), gray16="scale")
    assert np.asarray(reader.load_image("a.pgm"))[0, :, 0].tolist() in ([0, 127, 255], [0, 128, 255])
    assert np.asarray(MediaReader(str(root)).load_image("a.pgm"))[0, :, 0].tolist() == [0, 255, 255]
    assert reader.header("a.pgm").mode == "I;16"
    assert np.asarray(reader.load_image("a.tif"))[0, :, 0].tolist() == [0, 200, 255]
    assert reader.header("a.tif").mode == "I"


@pytest.mark.parametrize("name", [file.name for file in sorted((TILING / "images").iterdir())])
def test_loaded_pixels_are_what_the_original_sees(name: str) -> None:
    with Image.open(TILING / "images" / name) as image:
        expected = image.convert("RGB").tobytes()
    assert MediaReader(str(TILING / "images")).load_image(name).tobytes() == expected


def test_reader_and_error_travel_to_workers(root: Path) -> None:
    reader = pickle.loads(pickle.dumps(MediaReader(str(root))))
    with pytest.raises(MediaError) as caught:
        reader.load_image("none.png")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), copy.reason, copy.message) == (MediaError, "file_missing", caught.value.message)
    assert "'none.png'" in copy.message
