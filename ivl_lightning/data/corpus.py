"""The indexed datasets of one meta.json laid end to end: row number -> record, cost, dataset."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.annotations import AnnotationFile, DatasetSpec, read_meta
from ivl_lightning.data.encoding import EncoderFactory, RowEncoder
from ivl_lightning.data.exclusion import read_exclusions, without_excluded
from ivl_lightning.data.index import DatasetIndex, build_indexes, cached_indexes
from ivl_lightning.data.json_spans import RowSpan
from ivl_lightning.data.measuring import digest_text, measure_spans, row_digest
from ivl_lightning.data.pair_plan import PairRows
from ivl_lightning.data.plan import PlanRows
from ivl_lightning.structures import Record, Reject, RowError, RowKey


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

    @property
    def pairs(self) -> bool:
        """Whether rows are preference pairs."""
        return any(encoder.pairs for encoder in self.encoders)

    def __len__(self) -> int:
        return sum(self.sizes)

    def column(self, name: str) -> NDArray[Any]:
        """A column of all rows, `[n]`; not to be written to."""
        columns = [index.columns[name] for index in self.indexes]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    @cached_property
    def plan_rows(self) -> PlanRows:
        """What the plan knows of the rows."""
        most = self.column("frames")
        table = self.encoders[0].frame_tokens if most.any() else np.empty(0, dtype=np.int64)
        return PlanRows(
            self.column("tokens"),
            self.column("labels"),
            self.column("tiles"),
            most_frames=most,
            fewest_frames=self.column("min_frames"),
            frame_tokens=table,
        )

    @cached_property
    def pair_rows(self) -> PairRows:
        """What the plan of preference pairs knows of the rows."""
        rows = {field.name: getattr(self.plan_rows, field.name) for field in fields(self.plan_rows)}
        return PairRows(**rows, chosen_labels=self.column("chosen_labels"), digests=self.column("digest"))

    def dataset_of(self, row: int) -> int:
        """Number of the dataset a row belongs to."""
        return int(np.searchsorted(np.cumsum(self.sizes), row, side="right"))

    def place(self, row: int) -> tuple[int, Record]:
        """Dataset number of a row, and its record without content."""
        dataset = self.dataset_of(row)
        index = self.indexes[dataset]
        local = row - sum(self.sizes[:dataset])
        line, offset, digest = (int(index.columns[name][local]) for name in ("line", "offset", "digest"))
        return dataset, Record(index.name, index.file, line, {}, offset, digest_text(digest))

    def rows_of(self, keys: Set[RowKey]) -> NDArray[np.int64]:
        """Rows with these keys, rising; keys of other rows are passed over."""
        found, start = [np.empty(0, np.int64)], 0
        for index in self.indexes:
            own = {offset: digest for name, offset, digest in keys if name == index.name}
            places = np.flatnonzero(np.isin(index.columns["offset"], list(own)))
            same = [
                digest_text(int(index.columns["digest"][place])) == own[int(index.columns["offset"][place])]
                for place in places
            ]
            found.append(start + places[np.array(same, dtype=bool)])
            start += len(index)
        return np.concatenate(found)

    def locate(self, row: int) -> tuple[int, Record]:
        """Dataset number and record of a row.

        Raises:
            RowError: `row_lost` or `index_stale` if the annotation file no longer holds the row that was measured.
        """
        dataset, place = self.place(row)
        local = row - sum(self.sizes[:dataset])
        file = AnnotationFile(place.file)
        raw = file.read(place.offset, int(self.indexes[dataset].columns["length"][local]))
        if digest_text(row_digest(raw)) != place.digest:
            raise RowError(
                "index_stale", f"{place.file} holds another row at offset {place.offset} than when it was measured"
            )
        return dataset, replace(place, row=file.parse(raw))

    def split(self, held_back: NDArray[np.bool_]) -> tuple[Corpus, Corpus]:
        """Two corpora: the rows where `held_back` is false, and those where it is true."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        parts = [held_back[start:stop] for start, stop in pairwise(starts)]
        return self._select([~part for part in parts]), self._select(parts)

    def _select(self, masks: Sequence[NDArray[np.bool_]]) -> Corpus:
        indexes = (index.select(mask) for index, mask in zip(self.indexes, masks, strict=True))
        return replace(self, indexes=tuple(indexes))

    def view(self, names: Sequence[str]) -> Corpus:
        """The datasets of these names, in this order."""
        if tuple(names) == tuple(spec.name for spec in self.specs):
            return self
        numbers = {spec.name: number for number, spec in enumerate(self.specs)}
        chosen = [numbers[name] for name in names]
        return Corpus(tuple(self.encoders[n] for n in chosen), tuple(self.indexes[n] for n in chosen))

    def measured_again(self, factory: EncoderFactory) -> Corpus:
        """The same rows under other settings (validation has its own tile limit)."""
        other = replace(self, encoders=tuple(factory(spec) for spec in self.specs))
        indexes = []
        for encoder, index in zip(other.encoders, self.indexes, strict=True):
            places = index.columns["line"], index.columns["offset"], index.columns["length"]
            spans = [RowSpan(*map(int, place)) for place in zip(*places, strict=True)]
            measured = measure_spans(encoder, spans)
            indexes.append(DatasetIndex(index.name, index.file, measured.columns, measured.rejects))
        return replace(other, indexes=tuple(indexes))


def read_corpus(
    meta: str,
    factory: EncoderFactory,
    *,
    cache_dir: Path | None,
    progress: bool,
    workers: int | None = None,
    exclude: str | None = None,
    look_again: bool = False,
) -> Corpus:
    """Read and measure all datasets of a meta.json.

    Args:
        meta: the meta file.
        factory: makes the encoder of a dataset.
        cache_dir: folder of cached indexes; None keeps none.
        progress: show a bar while measuring.
        workers: processes that measure.
        exclude: exclusion list; `check_exclusions` says what of it does nothing.
        look_again: see `build_indexes`.

    Raises:
        ValueError: the meta file or the exclusion list is wrong, or the cache folder does not take an index.
    """
    encoders = tuple(factory(spec) for spec in read_meta(meta))
    excluded = {} if exclude is None else read_exclusions(exclude)
    indexes = build_indexes(encoders, cache_dir=cache_dir, workers=workers, progress=progress, look_again=look_again)
    return Corpus(encoders, tuple(without_excluded(index, excluded) for index in indexes))


def cached_corpus(meta: str, factory: EncoderFactory, *, cache_dir: Path, exclude: str | None = None) -> Corpus | None:
    """All datasets of a meta.json as the cache has them; None where one is not measured.

    Args:
        meta, factory, cache_dir, exclude: see `read_corpus`.

    Raises:
        ValueError: the meta file or the exclusion list is wrong.
    """
    encoders = tuple(factory(spec) for spec in read_meta(meta))
    indexes = cached_indexes(encoders, cache_dir)
    if indexes is None:
        return None
    excluded = {} if exclude is None else read_exclusions(exclude)
    return Corpus(encoders, tuple(without_excluded(index, excluded) for index in indexes))


def hold_back(digests: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """Mask of the rows with the `count` smallest digests; rows of an equal one go to the same side.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if count <= 0:
        return np.zeros(len(digests), dtype=bool)
    if count >= len(digests):
        raise ValueError(f"data.val_rows={count} would hold back all {len(digests)} usable rows")
    threshold = np.partition(digests, count - 1)[count - 1]
    held_back = digests <= threshold
    if held_back.all():
        raise ValueError(f"data.val_rows={count} would hold back all {len(digests)} usable rows, which are equal")
    return held_back
