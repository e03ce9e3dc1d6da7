"""Pictures, videos and folders of frames from a real S3 server, also from loader workers, forked and spawned."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ivl_lightning.data import storage
from ivl_lightning.data.media import MediaError, MediaReader

pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
av = pytest.importorskip("av")

START_SECONDS = 30
LARGE = (1600, 1200)
CLIP_FRAMES = 20


class Store(NamedTuple):
    """A running server with a bucket of media."""

    root: str
    log: Path

    def requests(self) -> list[str]:
        return re.findall(r"(?:HEAD|GET) /\S+", self.log.read_text())


def gray_level(number: int) -> int:
    return 20 + 10 * number


def as_jpeg(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def flat(number: int) -> np.ndarray:
    return np.full((32, 64, 3), gray_level(number), dtype=np.uint8)


def film() -> bytes:
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(CLIP_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(flat(number))))
        container.mux(stream.encode())
    return buffer.getvalue()


def numbers(images: list[Image.Image]) -> list[int]:
    return [round((float(np.asarray(image).mean()) - 20) / 10) for image in images]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the S3 server did not start: {log.read_text()}")
            time.sleep(0.05)
        else:
            return


def configure(settings: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """As a user does it: variables that fsspec reads when it is imported; here it was imported long ago."""
    for name, value in settings.items():
        patch.setenv(name, value)
    fsspec.config.set_conf_env(fsspec.config.conf)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output, pytest.MonkeyPatch.context() as patch:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_for(f"{url}/moto-api/", server, log)
            patch.setattr(fsspec.config, "conf", dict(fsspec.config.conf))
            patch.setitem(fsspec.config.conf, "s3", {})
            configure(
                {
                    "FSSPEC_S3_ENDPOINT_URL": url,
                    "FSSPEC_S3_KEY": "test",
                    "FSSPEC_S3_SECRET": "test",
                    "AWS_DEFAULT_REGION": "us-east-1",
                },
                patch,
            )
            upload()
            yield Store("s3://pictures/data", log)
        finally:
            server.terminate()
            server.wait(timeout=10)


def upload() -> None:
    bucket = fsspec.filesystem("s3")
    bucket.mkdir("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (LARGE[1], LARGE[0], 3), dtype=np.uint8)
    bucket.pipe("pictures/data/large.jpg", as_jpeg(noise))
    bucket.pipe("pictures/data/small.jpg", as_jpeg(flat(3)))
    bucket.pipe("pictures/data/film.mp4", film())
    bucket.pipe("pictures/secret.jpg", as_jpeg(flat(0)))
    for number in range(12):
        bucket.pipe(f"pictures/data/frames/f_{number}.jpg", as_jpeg(flat(number)))
    bucket.invalidate_cache()


@pytest.fixture
def reader(store: Store) -> MediaReader:
    return MediaReader(store.root, allowed_schemes=("s3",))


def reason(reader: MediaReader, path: str) -> str:
    with pytest.raises(MediaError) as caught:
        reader.load_image(path)
    return caught.value.reason


def test_pictures(reader: MediaReader) -> None:
    assert reader.image_size("large.jpg") == LARGE
    assert reader.load_image("large.jpg").size == LARGE
    assert numbers([reader.load_image("s3://pictures/data/small.jpg")]) == [3]


def test_a_header_costs_two_requests_and_few_bytes(store: Store, reader: MediaReader) -> None:
    """One for the size, one for 64 KiB of a file of 2 MB."""
    before = len(store.requests())
    reader.header("large.jpg")
    made = store.requests()[before:]
    assert [request.split()[0] for request in made] == ["HEAD", "GET"]
    with reader.open("large.jpg", access="head") as file:
        Image.open(file)
        handle: Any = file
        assert handle.cache.total_requested_bytes < 100_000 < handle.size


def test_a_picture_costs_two_requests(store: Store, reader: MediaReader) -> None:
    before = len(store.requests())
    reader.load_image("small.jpg")
    assert len(store.requests()) - before == 2


def test_video_and_folder_of_frames(reader: MediaReader) -> None:
    header = reader.video_header("film.mp4")
    assert (header.width, header.height, header.frames, header.rate) == (64, 32, CLIP_FRAMES, 10)
    assert numbers(reader.load_frames("film.mp4", [19, 0, 7])) == [19, 0, 7]
    assert reader.video_header("film.mp4", (0.5, 1.0)).frames == 5
    assert numbers(reader.load_frames("film.mp4", [0, 4], (0.5, 1.0))) == [5, 9]
    assert reader.video_header("frames").frames == 12
    assert numbers(reader.load_frames("frames", [11, 2, 10])) == [11, 2, 10]


def test_listings_do_not_pile_up(reader: MediaReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec keeps each listing for ever: its limits hold for what is asked for alone."""
    monkeypatch.setattr(storage, "_LISTINGS", 3)
    client = storage._store("s3")
    assert client.dircache.listings_expiry_time == 60
    for number in range(10):
        client.dircache[f"pictures/other{number}"] = []
        reader.video_header("frames")
    assert len(client.dircache) <= 4


def test_faults(store: Store, reader: MediaReader) -> None:
    assert reason(reader, "none.jpg") == "file_missing"
    assert reason(reader, "../secret.jpg") == "path_escape"
    assert reason(reader, "s3://pictures/secret.jpg") == "path_escape"
    assert reason(reader, "https://localhost/a.jpg") == "path_scheme"
    assert reason(MediaReader("s3://no-such-bucket", allowed_schemes=("s3",)), "a.jpg") == "file_missing"
    for path in ("none.mp4", "none"):
        with pytest.raises(MediaError) as caught:
            reader.video_header(path)
        assert caught.value.reason == "file_missing"
    with pytest.raises(ValueError, match=r"not among data\.allowed_schemes"):
        MediaReader(store.root)


class StoredMedia(Dataset[tuple[int, int, int, int]]):
    """What a training dataset does in a worker: headers, pictures, frames."""

    def __init__(self, reader: MediaReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int, int, int]:
        picture = self.reader.load_image("small.jpg")
        (frame,) = self.reader.load_frames("film.mp4", [index])
        (other,) = self.reader.load_frames("frames", [index])
        return (os.getpid(), *numbers([picture, frame, other]))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers(reader: MediaReader, start: str) -> None:
    """The parent has used the store before, so its client's thread runs and is not there in a forked worker."""
    reader.load_image("small.jpg")
    loader = DataLoader(StoredMedia(reader), batch_size=None, num_workers=1, multiprocessing_context=start, timeout=60)
    rows = list(loader)
    assert [tuple(row[1:]) for row in rows] == [(3, index, index) for index in range(4)]
    assert os.getpid() not in {row[0] for row in rows}
    assert numbers([reader.load_image("small.jpg")]) == [3]


def test_missing_s3fs_is_no_fault_of_the_row(store: Store) -> None:
    program = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from ivl_lightning.data.media import MediaReader, MediaError\n"
        f"reader = MediaReader({store.root!r}, allowed_schemes=('s3',))\n"
        "for read in (reader.header, reader.load_image, reader.video_header):\n"
        "    try:\n        read('frames')\n"
        "    except ValueError as error:\n        assert not isinstance(error, MediaError); print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.count("pip install 'ivl-lightning[s3]'") == 3
