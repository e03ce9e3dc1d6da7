"""How many rows the datasets of a meta.json have, at a glance: told by the file, counted, or estimated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ivl_lightning.data.annotations import AnnotationFile, DatasetSpec, read_meta

_BYTES_COUNTED = 1 << 26
"""Of all annotation files of a meta together; what lies behind is estimated, so that a glance takes a second."""


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """A dataset of a meta file.

    Attributes:
        name: of the dataset.
        rows: of its annotation file.
        repeat_time: how often they are seen in an epoch.
        counted: whether every row was counted; else the number is the meta's own, or an estimate.
    """

    name: str
    rows: int
    repeat_time: float
    counted: bool

    @property
    def samples(self) -> int:
        """Samples of an epoch, as the mixture has them."""
        return int(self.rows * self.repeat_time)


@dataclass(frozen=True, slots=True)
class MetaRows:
    """The datasets of a meta file."""

    datasets: tuple[DatasetRows, ...]

    @property
    def rows(self) -> int:
        """Rows of all datasets."""
        return sum(dataset.rows for dataset in self.datasets)

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(dataset.samples for dataset in self.datasets)

    @property
    def counted(self) -> bool:
        """Whether every row was counted."""
        return all(dataset.counted for dataset in self.datasets)


@cache
def read_rows(meta: str) -> MetaRows:
    """The datasets of a meta file and their rows.

    Args:
        meta: path of an official meta.json.

    Raises:
        MetaError: the file cannot be used.
    """
    specs = read_meta(meta)
    entries = json.loads(Path(meta).read_text(encoding="utf-8-sig"))
    limit = _BYTES_COUNTED // len(specs)
    return MetaRows(tuple(_dataset(spec, entries[spec.name].get("length"), limit) for spec in specs))


def _dataset(spec: DatasetSpec, length: object, limit: int) -> DatasetRows:
    if isinstance(length, int) and length > 0:
        return DatasetRows(spec.name, length, spec.repeat_time, counted=False)
    rows, counted = _count(Path(spec.annotation), limit)
    return DatasetRows(spec.name, rows, spec.repeat_time, counted)


def _count(annotation: Path, limit: int) -> tuple[int, bool]:
    """Rows of a file, and whether they are all counted: behind `limit` bytes they are taken to be as long as before."""
    rows = 0
    for rows, span in enumerate(AnnotationFile(annotation).iter_lines(), start=1):
        end = span.offset + span.length
        if end > limit:
            return round(rows * annotation.stat().st_size / end), False
    return rows, True
