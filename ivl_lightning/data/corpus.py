"""The indexed datasets of one meta.json laid end to end: row number -> record, cost, dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.annotations import AnnotationFile, DatasetSpec, read_meta
from ivl_lightning.data.encoding import EncoderFactory, RowEncoder
from ivl_lightning.data.index import DatasetIndex, build_index
from ivl_lightning.data.ledger import reject
from ivl_lightning.structures import Record, Reject, RowError, SampleCost


@dataclass(frozen=True)
class Corpus:
    """Rows that can be used, numbered over all datasets.

    Attributes:
        encoders: one per dataset.
        indexes: one per dataset, in the same order.
    """

    encoders: tuple[RowEncoder, ...]
    indexes: tuple[DatasetIndex, ...]

    @property
    def specs(self) -> tuple[DatasetSpec, ...]:
        """The datasets."""
        return tuple(encoder.spec for encoder in self.encoders)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Usable rows of each dataset."""
        return tuple(len(index) for index in self.indexes)

    @property
    def rejects(self) -> tuple[Reject, ...]:
        """Rows that cannot be used, of all datasets."""
        return tuple(line for index in self.indexes for line in index.rejects)

    def __len__(self) -> int:
        return sum(self.sizes)

    def column(self, name: str) -> NDArray[Any]:
        """A column of all rows, `[n]`."""
        return np.concatenate([index.columns[name] for index in self.indexes])

    def dataset_of(self, row: int) -> int:
        """Number of the dataset a row belongs to."""
        return int(np.searchsorted(np.cumsum(self.sizes), row, side="right"))

    def locate(self, row: int) -> tuple[int, Record]:
        """Dataset number and record of a row.

        Raises:
            RowError: the annotation file no longer holds that row.
        """
        dataset = self.dataset_of(row)
        columns = self.indexes[dataset].columns
        local = row - sum(self.sizes[:dataset])
        spec = self.encoders[dataset].spec
        file = AnnotationFile(spec.annotation)
        data = file.read(int(columns["offset"][local]), int(columns["length"][local]))
        return dataset, Record(spec.name, str(spec.annotation), int(columns["line"][local]), file.parse(data))

    def split(self, held_back: NDArray[np.bool_]) -> tuple[Corpus, Corpus]:
        """Two corpora: the rows where `held_back` is false, and those where it is true."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        parts = [held_back[start:stop] for start, stop in pairwise(starts)]
        return self._select([~part for part in parts]), self._select(parts)

    def _select(self, masks: Sequence[NDArray[np.bool_]]) -> Corpus:
        indexes = [
            replace(index, columns={name: values[mask] for name, values in index.columns.items()})
            for index, mask in zip(self.indexes, masks, strict=True)
        ]
        return replace(self, indexes=tuple(indexes))

    def measured_again(self, factory: EncoderFactory) -> Corpus:
        """The same rows under other settings (validation has its own tile limit)."""
        other = replace(self, encoders=tuple(factory(spec) for spec in self.specs))
        indexes = []
        start = 0
        for encoder, index in zip(other.encoders, self.indexes, strict=True):
            indexes.append(_measure_rows(self, encoder, index, range(start, start + len(index))))
            start += len(index)
        return replace(other, indexes=tuple(indexes))


def _measure_rows(corpus: Corpus, encoder: RowEncoder, index: DatasetIndex, rows: range) -> DatasetIndex:
    kept: list[int] = []
    costs: list[SampleCost] = []
    rejects: list[Reject] = []
    for position, row in enumerate(rows):
        record = corpus.locate(row)[1]
        try:
            costs.append(encoder.measure(record))
        except RowError as error:
            rejects.append(reject(record, error))
            continue
        kept.append(position)
    columns = {name: values[kept] for name, values in index.columns.items()}
    columns["tokens"] = np.asarray([cost.tokens for cost in costs], dtype=np.int32)
    columns["labels"] = np.asarray([cost.labels for cost in costs], dtype=np.int32)
    columns["tiles"] = np.asarray([cost.num_tiles for cost in costs], dtype=np.int32)
    return DatasetIndex(index.name, columns, tuple(rejects))


def read_corpus(meta: str, factory: EncoderFactory, *, cache_dir: Path | None, progress: bool) -> Corpus:
    """Read and measure all datasets of a meta.json.

    Raises:
        ValueError: the meta file is wrong.
    """
    encoders = tuple(factory(spec) for spec in read_meta(meta))
    indexes = tuple(build_index(encoder, cache_dir=cache_dir, progress=progress) for encoder in encoders)
    return Corpus(encoders, indexes)


def hold_back(digests: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """Mask of the rows with the `count` smallest digests; equal rows go to the same side.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if count <= 0:
        return np.zeros(len(digests), dtype=bool)
    if count >= len(digests):
        raise ValueError(f"data.val_rows={count} would hold back all {len(digests)} usable rows")
    threshold = np.partition(digests, count - 1)[count - 1]
    return digests <= threshold
