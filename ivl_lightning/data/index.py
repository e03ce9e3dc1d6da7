"""The index: every row measured once, from its text and the headers of its media; kept by content.

An index is found again by a hash of all that decides it: the annotation file's bytes, the tokenizer, the template and
the tile settings. Measuring goes on where a killed process stopped, and of several processes one measures while the
others wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.index_file import BrokenIndexError, IndexParts, IndexWriteError, read_index, write_index
from ivl_lightning.data.measuring import Measured, concatenate, measure_rows
from ivl_lightning.models.tokenizer import tokenizer_fingerprint
from ivl_lightning.structures import Reject

_VERSION = 4
_PART_ROWS = 32_768
_PART_SECONDS = 20.0
"""A part is written after so many rows or seconds: what a kill can cost."""

_SAY_SECONDS = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DatasetIndex:
    """Usable rows of one dataset, in file order, and the rest with reasons.

    Attributes:
        name: of the dataset.
        file: its annotation file.
        columns: see `measuring.COLUMNS`.
        rejects: rows that cannot be used.
    """

    name: str
    file: str
    columns: dict[str, NDArray[np.int64]]
    rejects: tuple[Reject, ...]

    def __len__(self) -> int:
        return len(self.columns["offset"])

    def select(self, mask: NDArray[np.bool_]) -> DatasetIndex:
        """The rows where `mask` is true."""
        if mask.all():
            return self
        return replace(self, columns={name: values[mask] for name, values in self.columns.items()})

    @property
    def fingerprint(self) -> str:
        """Hash of the rows' content and cost; equal fingerprints mean equal plans."""
        digest = hashlib.blake2b(digest_size=8)
        for name in ("digest", "tokens", "labels", "chosen_labels", "tiles", "frames", "min_frames"):
            digest.update(np.ascontiguousarray(self.columns[name]).data)
        return digest.hexdigest()


def build_indexes(
    encoders: Sequence[RowEncoder],
    *,
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    look_again: bool = False,
) -> tuple[DatasetIndex, ...]:
    """Index of each encoder's dataset, read from the cache where content and settings are the same.

    Args:
        encoders: measure the rows, one per dataset.
        cache_dir: folder of cached indexes; None keeps none.
        workers: processes that measure; None takes one for each core.
        progress: show a bar with rows per second and the time left.
        look_again: measure rows of a cached index again whose media could not be read; they may have come since.

    Raises:
        IndexWriteError: the cache folder does not take an index.
    """
    paths = [None if cache_dir is None else _path(cache_dir, encoder) for encoder in encoders]
    missing = [
        Path(encoder.spec.annotation).stat().st_size
        for encoder, path in zip(encoders, paths, strict=True)
        if path is None or not path.is_file()
    ]
    # In a log file a bar would leave nothing but blank lines.
    bar = _progress_bar(disable=not (progress and missing and sys.stderr.isatty()))
    with bar:
        measuring = _Measuring(bar, total=sum(missing), workers=workers, look_again=look_again, say=progress)
        return tuple(_index(encoder, path, measuring) for encoder, path in zip(encoders, paths, strict=True))


def cached_indexes(encoders: Sequence[RowEncoder], cache_dir: Path) -> tuple[DatasetIndex, ...] | None:
    """Index of each encoder's dataset as the cache has it; None where one is not whole: nothing is measured."""
    found = [_read_if_whole(_path(cache_dir, encoder)) for encoder in encoders]
    named = tuple(_named(encoder, one) for encoder, one in zip(encoders, found, strict=True) if one is not None)
    return named if len(named) == len(encoders) else None


def _index(encoder: RowEncoder, path: Path | None, measuring: _Measuring) -> DatasetIndex:
    measured = measuring.whole(encoder) if path is None else _cached(encoder, path, measuring)
    return _named(encoder, measured)


def _named(encoder: RowEncoder, measured: Measured) -> DatasetIndex:
    return DatasetIndex(encoder.spec.name, encoder.spec.annotation, measured.columns, measured.rejects)


def _cached(encoder: RowEncoder, path: Path, measuring: _Measuring) -> Measured:
    found = _read_if_whole(path)
    if found is not None and not (measuring.look_again and _media_rejects(found)):
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock is the operating system's: it ends with the process that holds it.
        lock = FileLock(f"{path}.lock").acquire()
    except (OSError, NotImplementedError) as error:
        if found is not None:
            _log.warning("%s cannot be locked (%s), so its rejects are not looked at again", path, error)
            return found
        raise IndexWriteError(
            f"data.cache_dir={path.parent} cannot be used: {error}. Give a folder that can be written to"
        ) from error
    with lock:
        found = _read_if_whole(path)
        return measuring.resumed(encoder, path) if found is None else _looked_again(encoder, path, found, measuring)


def _media_rejects(measured: Measured) -> set[int]:
    """Offsets of rows that were rejected for a file that may be another today."""
    kinds = ("file_", "image_", "video_", "exif_")
    return {line.offset for line in measured.rejects if line.reason.startswith(kinds)}


def _looked_again(encoder: RowEncoder, path: Path, found: Measured, measuring: _Measuring) -> Measured:
    offsets = _media_rejects(found)
    again = concatenate(list(measure_rows(encoder, only=offsets, workers=measuring.workers)))
    other = tuple(line for line in found.rejects if line.offset not in offsets)
    if set(again.rejects) | set(other) == set(found.rejects):
        return found
    both = concatenate([replace(found, rejects=other), again])
    order = np.argsort(both.columns["offset"], kind="stable")
    columns = {name: values[order] for name, values in both.columns.items()}
    mended = Measured(columns, tuple(sorted(both.rejects, key=lambda line: line.offset)), found.end)
    write_index(path, mended)
    return mended


def _read_if_whole(path: Path) -> Measured | None:
    if not path.is_file():
        return None
    try:
        return read_index(path)
    except BrokenIndexError as error:
        _log.warning("%s; measuring again", error)
        path.unlink(missing_ok=True)
        return None


class _Measuring:
    """Measures datasets one after the other under one progress bar."""

    def __init__(self, bar: Progress, *, total: int, workers: int | None, look_again: bool, say: bool) -> None:
        self.bar = bar
        self.say = say and bar.disable
        self._said = self._since = time.monotonic()
        self.workers = workers
        self.look_again = look_again
        self.task = bar.add_task("measuring", total=total, rows=0, start=not bar.disable)

    def whole(self, encoder: RowEncoder) -> Measured:
        """All rows, held in memory."""
        self._show(encoder, 0)
        return concatenate(list(map(self._advance, measure_rows(encoder, workers=self.workers))))

    def resumed(self, encoder: RowEncoder, path: Path) -> Measured:
        """All rows, from where a killed process stopped; writes the index."""
        parts = IndexParts(path.with_suffix(".parts"))
        self._show(encoder, parts.end)
        stretches: list[Measured] = []
        since = time.monotonic()
        for stretch in measure_rows(encoder, start=parts.end, workers=self.workers):
            stretches.append(self._advance(stretch))
            rows = sum(one.num_rows for one in stretches)
            if rows >= _PART_ROWS or time.monotonic() - since > _PART_SECONDS:
                parts.add(stretches)
                stretches, since = [], time.monotonic()
        return parts.finish(path, stretches)

    def _show(self, encoder: RowEncoder, end: int) -> None:
        self.bar.update(self.task, description=f"measuring {encoder.spec.name}")
        self._base = self.bar.tasks[self.task].completed
        self.bar.update(self.task, completed=self._base + end)

    def _advance(self, stretch: Measured) -> Measured:
        rows = self.bar.tasks[self.task].fields["rows"] + stretch.num_rows
        self.bar.update(self.task, completed=self._base + stretch.end, rows=rows)
        if self.say and time.monotonic() - self._said > _SAY_SECONDS:
            self._say(rows)
        return stretch

    def _say(self, rows: int) -> None:
        """A line for log files, where there is no bar."""
        self._said = time.monotonic()
        task, seconds = self.bar.tasks[self.task], self._said - self._since
        left = seconds * (task.total or 0) / max(task.completed, 1) - seconds
        rate = f"{rows:,} rows, {rows / seconds:,.0f} rows/s, {left / 60:,.0f} min left"
        print(f"{task.description}: {rate}", file=sys.stderr, flush=True)


class _RowRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rows = task.fields["rows"]
        rate = f" {rows / task.elapsed:,.0f} rows/s" if task.elapsed and rows else ""
        return Text(f"{rows:,} rows{rate}")


def _progress_bar(*, disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), _RowRate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=disable)


def _path(cache_dir: Path, encoder: RowEncoder) -> Path:
    # A dataset's name may hold anything; the file stays in the folder.
    return cache_dir / f"{quote(encoder.spec.name, safe='')}-{_key(encoder)}.parquet"


def _key(encoder: RowEncoder) -> str:
    """Hash of all that decides an index: annotation file and bytes, root, tokenizer, settings."""
    settings = asdict(encoder.settings)
    # How pixels are made changes no count.
    del settings["resize"]
    reader = {name: value for name, value in asdict(encoder.reader).items() if name != "gray16"}
    parts = {
        "version": _VERSION,
        # Rejects name their file, so the same content elsewhere is another index.
        "file": str(encoder.spec.annotation),
        "annotation": _content_hash(encoder.spec.annotation),
        "max_dynamic_patch": encoder.spec.max_dynamic_patch,
        "reader": reader,
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "settings": settings,
        "rows": type(encoder).__name__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _content_hash(path: str) -> str:
    state = Path(path).stat()
    return _hash_of(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _hash_of(path: str, size: int, changed: int) -> str:
    """Read once in a process: training, validation and set-up ask for the same file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
