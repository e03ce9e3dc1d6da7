"""Measure every row once, without decoding a pixel; keep the result by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.progress import track

from ivl_lightning.data.annotations import AnnotationFile
from ivl_lightning.data.encoding import VIDEO_NOT_READ, RowEncoder
from ivl_lightning.data.ledger import reject
from ivl_lightning.models.tokenizer import tokenizer_fingerprint
from ivl_lightning.structures import Record, Reject, RowError

_VERSION = 1
_COLUMNS = {
    "offset": np.int64,
    "length": np.int64,
    "line": np.int64,
    "tokens": np.int32,
    "labels": np.int32,
    "tiles": np.int32,
    "digest": np.uint64,
}


@dataclass(frozen=True, slots=True)
class DatasetIndex:
    """Usable rows of one dataset, in file order, and the rest with reasons.

    Attributes:
        name: of the dataset.
        columns: `offset`, `length`, `line` of each row in the annotation file; `tokens`, `labels`, `tiles` it costs;
            `digest` of its bytes.
        rejects: rows that cannot be used.
    """

    name: str
    columns: dict[str, NDArray[np.int64]]
    rejects: tuple[Reject, ...]

    def __len__(self) -> int:
        return len(self.columns["offset"])


def build_index(encoder: RowEncoder, *, cache_dir: Path | None = None, progress: bool = True) -> DatasetIndex:
    """Index of the encoder's dataset, read from the cache where content and settings are the same.

    Args:
        encoder: measures the rows.
        cache_dir: folder of cached indexes; None keeps none.
        progress: show a bar.
    """
    if cache_dir is None:
        return _measure(encoder, progress)
    # A dataset's name may hold anything; the file stays in the folder.
    path = cache_dir / f"{quote(encoder.spec.name, safe='')}-{_key(encoder)}.parquet"
    if path.is_file():
        return _read(path, encoder.spec.name)
    index = _measure(encoder, progress)
    _write(path, index)
    return index


def _measure(encoder: RowEncoder, progress: bool) -> DatasetIndex:
    columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    rejects: list[Reject] = []
    file = AnnotationFile(encoder.spec.annotation)
    lines: Iterator[tuple[int, int, int]] = file.iter_lines()
    for line, offset, length in track(lines, f"measuring {encoder.spec.name}", transient=True, disable=not progress):
        data = file.read(offset, length)
        record = Record(encoder.spec.name, str(encoder.spec.annotation), line, {})
        try:
            record = Record(record.dataset, record.file, line, file.parse(data))
            cost = encoder.measure(record)
        except RowError as error:
            rejects.append(reject(record, error, counted=error.reason != VIDEO_NOT_READ))
            continue
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        values = (offset, length, line, cost.tokens, cost.labels, cost.num_tiles, digest)
        for name, value in zip(_COLUMNS, values, strict=True):
            columns[name].append(value)
    arrays = {name: np.asarray(columns[name], dtype=kind) for name, kind in _COLUMNS.items()}
    return DatasetIndex(encoder.spec.name, arrays, tuple(rejects))


def _key(encoder: RowEncoder) -> str:
    """Hash of all that decides an index: annotation file and bytes, root, tokenizer, settings."""
    with Path(encoder.spec.annotation).open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    parts = {
        "version": _VERSION,
        # Rejects name their file, so the same content elsewhere is another index.
        "file": str(encoder.spec.annotation),
        "annotation": content,
        "max_dynamic_patch": encoder.spec.max_dynamic_patch,
        "reader": asdict(encoder.reader),
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "settings": asdict(encoder.settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _write(path: Path, index: DatasetIndex) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rejects = json.dumps([asdict(line) for line in index.rejects], ensure_ascii=False)
    table = pa.table(index.columns).replace_schema_metadata({"rejects": rejects})
    # Written aside and renamed: a killed process leaves no half file under the final name.
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(table, aside)
    aside.replace(path)


def _read(path: Path, name: str) -> DatasetIndex:
    table = pq.read_table(path)
    rejects = json.loads((table.schema.metadata or {})[b"rejects"])
    columns = {column: table[column].to_numpy() for column in _COLUMNS}
    return DatasetIndex(name, columns, tuple(Reject(**line) for line in rejects))
