"""What pictures and videos cost a worker, as ratios measured side by side in one run: `make bench`.

CPU time of one process and one thread, decoding included. The ways of doing a thing take turns, and the median of the
ratios of all turns counts. The plain way is the original's pipeline, written down here step by step: decode, resize
whole, crop tile by tile, thumbnail from the picture itself, float32, normalize, stack. Ours hands uint8 tiles to the
device, which normalizes them there.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ivl_lightning.constants import IMAGENET_MEAN, IMAGENET_STD
from ivl_lightning.data.augmentation import degrade_jpeg, sample_rng
from ivl_lightning.data.media import MediaReader
from ivl_lightning.data.tiling import cut_tiles, normalize_tiles

ROUNDS = 9
SIZE = 448
PICTURES = ((640, 480, 12), (1920, 1080, 12), (3508, 2480, 36))
"""Width, height and most tiles."""

VIDEO_FRAMES, VIDEO_RATE, SAMPLED = 300, 25, 16


class Row(NamedTuple):
    """A line of the table. `ratio` is the time of the plain way over that of ours."""

    case: str
    plain_ms: float
    ours_ms: float
    ratio: float
    target: str
    note: str


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(
    case: str, plain: Callable[[], object], ours: Callable[[], object], target: str = "", note: str = ""
) -> Row:
    """Run both in turn, once unmeasured and `ROUNDS` times measured."""
    plain(), ours()
    pairs = [(cpu_seconds(plain), cpu_seconds(ours)) for _ in range(ROUNDS)]
    plain_ms, ours_ms = (median(times) * 1e3 for times in zip(*pairs, strict=True))
    return Row(case, plain_ms, ours_ms, median(first / second for first, second in pairs), target, note)


def photo(width: int, height: int) -> bytes:
    """A picture with the spectrum of a photo and some strokes like print, as JPEG of quality 90."""
    rng = np.random.default_rng(0)
    levels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for scale in (4, 16, 64, 256):
        coarse = rng.normal(size=(3, max(2, height // scale), max(2, width // scale))).astype(np.float32)
        smooth = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in coarse]
        levels += (4 + 3 * scale**0.5) * np.stack([np.asarray(plane) for plane in smooth], axis=-1)
    pixels = levels.clip(0, 255).astype(np.uint8)
    for top, left in zip(rng.integers(0, height - 4, 800), rng.integers(0, width - 12, 800), strict=True):
        pixels[top : top + 3, left : left + rng.integers(2, 12)] = rng.integers(0, 80)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def plain_grid(width: int, height: int, max_tiles: int) -> tuple[int, int]:
    """The original lists all grids anew for each picture."""
    grids = {
        (cols, rows)
        for count in range(1, max_tiles + 1)
        for cols in range(1, count + 1)
        for rows in range(1, count + 1)
        if cols * rows <= max_tiles
    }
    best, best_distance = (1, 1), float("inf")
    for cols, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - cols / rows)
        if distance < best_distance or (distance == best_distance and width * height > 0.5 * SIZE * SIZE * cols * rows):
            best, best_distance = (cols, rows), distance
    return best


def plain_crops(image: Image.Image, max_tiles: int) -> list[Image.Image]:
    cols, rows = plain_grid(*image.size, max_tiles)
    resized = image.resize((cols * SIZE, rows * SIZE))
    corners = [(col * SIZE, row * SIZE) for row in range(rows) for col in range(cols)]
    crops = [resized.crop((left, top, left + SIZE, top + SIZE)) for left, top in corners]
    return [*crops, image.resize((SIZE, SIZE))] if len(crops) > 1 else crops


def plain_tensor(tile: Image.Image) -> torch.Tensor:
    tile = tile.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(tile, copy=True)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return levels.clone().sub_(mean).div_(std)


def plain_pipeline(data: bytes, max_tiles: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return torch.stack([plain_tensor(tile) for tile in plain_crops(image, max_tiles)])


def bench_tiling() -> list[Row]:
    rows = []
    for (width, height, max_tiles), exact_target in zip(PICTURES, (1.4, 1.1, 1.25), strict=True):
        data = photo(width, height)

        def plain(data: bytes = data, max_tiles: int = max_tiles) -> torch.Tensor:
            return plain_pipeline(data, max_tiles)

        def exact(data: bytes = data, max_tiles: int = max_tiles) -> torch.Tensor:
            return cut_tiles(Image.open(io.BytesIO(data)), max_tiles=max_tiles)

        def fast(data: bytes = data, max_tiles: int = max_tiles) -> torch.Tensor:
            return cut_tiles(Image.open(io.BytesIO(data)), max_tiles=max_tiles, resize="fast")

        expected, tiles = plain(), exact()
        off = "0" if torch.equal(normalize_tiles(tiles), expected) else "NOT 0"
        fast_off = int((tiles.int() - fast().int()).abs().max())
        name = f"{width} x {height}, {len(tiles)} tiles"
        rows.append(compare(f"tiling exact, {name}", plain, exact, f"{exact_target}", f"{off} levels off"))
        rows.append(compare(f"tiling fast, {name}", plain, fast, "2.0", f"{fast_off} levels off"))
    return rows


def plain_degrade(tiles: list[Image.Image]) -> list[Image.Image]:
    """The original's augmentation, from pictures to pictures."""
    degraded = []
    for tile, quality in zip(tiles, sample_rng(0, 0, 0).integers(75, 101, size=len(tiles)), strict=True):
        buffer = io.BytesIO()
        tile.save(buffer, format="JPEG", quality=int(quality))
        degraded.append(Image.open(buffer).convert("RGB").copy())
    return degraded


def array_degrade(tiles: torch.Tensor) -> torch.Tensor:
    """The same from planes to planes, by way of numpy."""
    pictures = [Image.fromarray(np.ascontiguousarray(tile.numpy().transpose(1, 2, 0))) for tile in tiles]
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in plain_degrade(pictures)])


def bench_degrading() -> list[Row]:
    image = Image.open(io.BytesIO(photo(640, 480)))
    tiles, pictures = cut_tiles(image), plain_crops(image, 12)
    same = torch.equal(array_degrade(tiles), degrade_jpeg(tiles, sample_rng(0, 0, 0)))
    note = "same pixels" if same else "OTHER PIXELS"
    name = f"JPEG augmentation of {len(tiles)} tiles"

    def ours() -> torch.Tensor:
        return degrade_jpeg(tiles, sample_rng(0, 0, 0))

    return [
        compare(f"{name}, against pictures to pictures", lambda: plain_degrade(pictures), ours, note=note),
        compare(f"{name}, against planes by way of numpy", lambda: array_degrade(tiles), ours, note=note),
    ]


def write_video(path: Path) -> None:
    """12 s of a moving picture, with a key frame every second."""
    import av

    still = Image.open(io.BytesIO(photo(1280, 720)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=VIDEO_RATE, options={"preset": "ultrafast", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        stream.codec_context.gop_size = VIDEO_RATE
        for number in range(VIDEO_FRAMES):
            frame = still.crop((number * 2, number, number * 2 + 640, number + 360))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def bench_video() -> list[Row]:
    try:
        import av
    except ImportError as error:
        print(f"no videos are measured: {error}")
        return []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path)
        reader = MediaReader(folder)

        def decode_all(indices: list[int]) -> list[Image.Image]:
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                frames = list(container.decode(video=0))
            return [frames[index].to_image() for index in indices]

        rows = []
        spread = [VIDEO_FRAMES * (2 * number + 1) // (2 * SAMPLED) for number in range(SAMPLED)]
        for name, indices in (
            ("spread out", spread),
            ("in the last 2 s", list(range(VIDEO_FRAMES - 48, VIDEO_FRAMES, 3))),
        ):
            ours = reader.load_frames("film.mp4", indices)
            same = all(one.tobytes() == other.tobytes() for one, other in zip(ours, decode_all(indices), strict=True))
            rows.append(
                compare(
                    f"{SAMPLED} of {VIDEO_FRAMES} frames {name}, against decoding all",
                    lambda indices=indices: decode_all(indices),
                    lambda indices=indices: reader.load_frames("film.mp4", indices),
                    note="same pixels" if same else "OTHER PIXELS",
                )
            )
        rows.append(
            compare(
                "video header, against decoding all",
                lambda: decode_all([]),
                lambda: reader.video_header("film.mp4"),
            )
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = [*bench_tiling(), *bench_degrading(), *bench_video()]
    print("| case | plain ms | ours ms | plain / ours | target | |\n|---|---|---|---|---|---|")
    for row in results:
        print(f"| {row.case} | {row.plain_ms:.2f} | {row.ours_ms:.2f} | {row.ratio:.2f} | {row.target} | {row.note} |")
