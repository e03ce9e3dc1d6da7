"""Rows of an annotation file measured in file order by several processes, a stretch of rows at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ivl_lightning.data.annotations import AnnotationFile
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.json_spans import RowSpan
from ivl_lightning.data.ledger import reject
from ivl_lightning.data.sampler import whole_item
from ivl_lightning.structures import Record, Reject, RowError, SampleCost

COLUMNS: dict[str, type[np.generic]] = {
    "offset": np.int64,
    "length": np.int64,
    "line": np.int32,
    "tokens": np.int32,
    "labels": np.int32,
    "chosen_labels": np.int32,
    "tiles": np.int32,
    "frames": np.int16,
    "min_frames": np.int16,
    "video_frames": np.int64,
    "video_rate": np.float32,
    "video_seconds": np.float32,
    "digest": np.uint64,
    "question": np.uint64,
}
"""What is kept of a usable row: its place, its cost, the most and fewest frames it may get, what its video holds, a
hash of its bytes, and one of its question, which several preference pairs may share. `chosen_labels` is 0 where the row
is no preference pair, and `question` then the hash of its bytes."""

_CHUNK_ROWS = 256
_SMALL_FILE = 1 << 18
"""Bytes up to which starting processes takes longer than measuring."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A stretch of consecutive rows.

    Attributes:
        columns: `COLUMNS` of the usable rows, `[n]` each.
        rejects: the other rows.
        end: offset behind the last row of the stretch.
    """

    columns: dict[str, NDArray[Any]]
    rejects: tuple[Reject, ...]
    end: int

    @property
    def num_rows(self) -> int:
        """Rows of the stretch, usable or not."""
        return len(self.columns["offset"]) + len(self.rejects)


def measure_rows(
    encoder: RowEncoder, *, start: int = 0, only: Set[int] | None = None, workers: int | None = None
) -> Iterator[Measured]:
    """Measure the rows of the encoder's dataset, in file order.

    Args:
        encoder: measures a row.
        start: offset from which rows are measured; those before were measured earlier.
        only: offsets of the rows that are measured; None measures all.
        workers: processes; None takes one for each core. A small file is measured in this process.
    """
    file = AnnotationFile(encoder.spec.annotation)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    if workers == 1 or file.path.stat().st_size - start <= _SMALL_FILE:
        workers = 0
    # The library's loader keeps the order, ends when this process is killed and reports a worker that dies.
    chunks = _Chunks(file, start, only)
    yield from DataLoader(
        _Stretches(encoder, file), sampler=chunks, batch_size=None, num_workers=workers, collate_fn=whole_item
    )


def measure_spans(encoder: RowEncoder, spans: Sequence[RowSpan]) -> Measured:
    """Measure some rows of a file, in this process."""
    stretches = _Stretches(encoder, AnnotationFile(encoder.spec.annotation))
    return stretches[spans] if spans else concatenate([])


def concatenate(stretches: Sequence[Measured]) -> Measured:
    """One stretch out of consecutive ones; none gives an empty one."""
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(stretch.columns[name] for stretch in stretches)])
        for name, dtype in COLUMNS.items()
    }
    rejects = tuple(line for stretch in stretches for line in stretch.rejects)
    return Measured(columns, rejects, stretches[-1].end if stretches else 0)


class _Chunks:
    """Row spans, a chunk at a time, found while the file is scanned."""

    def __init__(self, file: AnnotationFile, start: int, only: Set[int] | None) -> None:
        self.file = file
        self.start = start
        self.only = only

    def __iter__(self) -> Iterator[tuple[RowSpan, ...]]:
        spans = (span for span in self.file.iter_lines() if span.offset >= self.start)
        if self.only is not None:
            chosen = self.only
            spans = (span for span in spans if span.offset in chosen)
        while chunk := tuple(islice(spans, _CHUNK_ROWS)):
            yield chunk


class _Stretches(Dataset[Measured]):
    def __init__(self, encoder: RowEncoder, file: AnnotationFile) -> None:
        self.encoder = encoder
        self.file = file

    def __getitem__(self, spans: Sequence[RowSpan]) -> Measured:
        end = spans[-1].offset + spans[-1].length
        values: list[tuple[float, ...]] = []
        rejects: list[Reject] = []
        for span, row in zip(spans, self.file.read_spans(spans), strict=True):
            digest = row_digest(row)
            measured = self._measure(row, span, digest)
            if isinstance(measured, Reject):
                rejects.append(measured)
            else:
                values.append((span.offset, span.length, span.line, *measured))
        columns = zip(*values, strict=True) if values else [()] * len(COLUMNS)
        arrays = {name: np.array(column, dtype) for (name, dtype), column in zip(COLUMNS.items(), columns, strict=True)}
        return Measured(arrays, tuple(rejects), end)

    def _measure(self, raw: bytes, span: RowSpan, digest: int) -> tuple[float, ...] | Reject:
        spec = self.encoder.spec
        record = Record(spec.name, spec.annotation, span.line, {}, span.offset, digest_text(digest))
        try:
            record = replace(record, row=AnnotationFile.parse(raw))
            question = self.encoder.question_key(record.row)
            own = digest if question is None else row_digest(question)
            return *_numbers(self.encoder.measure(record)), digest, own
        except RowError as error:
            return reject(record, error)


def _numbers(cost: SampleCost) -> tuple[float, ...]:
    video = cost.video
    frames = (0, 0, 0, 0.0, 0.0) if video is None else (
        video.most, video.fewest, video.available, video.rate, video.duration,
    )  # fmt: skip
    return cost.tokens, cost.labels, cost.chosen_labels, cost.num_tiles, *frames


def row_digest(raw: bytes) -> int:
    """Hash of a row's bytes, 64 bits: the same row in another place has the same."""
    return digest_number(hashlib.blake2b(raw, digest_size=8).hexdigest())


def digest_number(text: str) -> int:
    """A digest written as 16 hexadecimal digits, as the index holds it."""
    return int(text, 16)


def digest_text(number: int) -> str:
    """A digest of the index, as lists for people show it."""
    return f"{number:016x}"
