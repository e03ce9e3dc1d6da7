"""Map-style datasets: a planned pack, or a group of prompts, -> tensors. Nothing here knows ranks or order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.augmentation import sample_rng
from ivl_lightning.data.collate import pack_samples, pad_prompts
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.ledger import reject
from ivl_lightning.data.reading import Reading
from ivl_lightning.data.sampler import NamedRows
from ivl_lightning.data.turns import split_last_answer
from ivl_lightning.structures import Encoded, PackedBatch, PlannedPack, PromptBatch, Record, Reject, RowError, RowKey

Sample = TypeVar("Sample")
Batch = TypeVar("Batch", covariant=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample of a pack comes from: corpus row, dataset number, name for error messages."""

    row: int
    dataset: int
    name: str


class CorpusDataset(NamedRows, Generic[Batch]):
    """Reads rows of a corpus and says which, for whoever waits for them.

    Args:
        corpus: the rows.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.notes = Reading()

    def rows_of(self, item: Any) -> Sequence[int]:
        """Rows that an item of the sampler needs."""
        raise NotImplementedError

    def names(self, item: Any) -> tuple[str, ...]:
        """Names of the rows that an item of the sampler needs."""
        return tuple(self._name(row) for row in self.rows_of(item))

    def reading(self) -> dict[str, float]:
        """Name of each row that is being read now -> seconds since when."""
        return {self._name(row): seconds for row, seconds in self.notes.rows().items()}

    def _name(self, row: int) -> str:
        return name_of(self.corpus.place(row)[1])


def name_of(record: Record) -> str:
    """A row's name for people: dataset, file and line."""
    return f"{record.dataset} {record.file}:{record.line}"


class PlannedDataset(CorpusDataset[Batch], Generic[Sample, Batch]):
    """Builds the micro-batch of a planned pack; subclasses say how a sample is encoded and how samples are laid out.

    Args:
        corpus: the rows.
        tile_size: side of a tile.
        filler_id: token of an empty micro-batch.
        left_out: rows that broke before; they are not tried again, so that a resumed run trains on what the run it
            continues would have.
    """

    def __init__(
        self, corpus: Corpus, *, tile_size: int, filler_id: int, left_out: frozenset[RowKey] = frozenset()
    ) -> None:
        super().__init__(corpus)
        self.tile_size = tile_size
        self.filler_id = filler_id
        self.left_out = left_out
        self._rows = corpus.plan_rows

    def __getitem__(self, planned: PlannedPack) -> Batch:
        """A sample that cannot be read is left out and reported; the pack goes on without it."""
        samples: list[Sample] = []
        places: list[Place] = []
        rejects: list[Reject] = []
        frames = planned.pack.frames or (0,) * len(planned.pack.samples)
        for sample, count in zip(planned.pack.samples, frames, strict=True):
            row = sample % len(self.corpus)
            dataset, record = self.corpus.place(row)
            if (record.dataset, record.offset, record.digest) in self.left_out:
                continue
            try:
                with self.notes.note(row):
                    record = self.corpus.locate(row)[1]
                    samples.append(self._encode(dataset, record, planned.epoch, sample, count))
            except RowError as error:
                rejects.append(reject(record, error, trained=True))
                continue
            places.append(Place(row, dataset, name_of(record)))
        return self._lay_out(samples, places, planned, tuple(rejects))

    def rows_of(self, item: PlannedPack) -> Sequence[int]:
        """Rows of a planned pack."""
        return [sample % len(self.corpus) for sample in item.pack.samples]

    def _encode(self, dataset: int, record: Record, epoch: int, sample: int, frames: int) -> Sample:
        """One sample; a RowError leaves it out."""
        raise NotImplementedError

    def _lay_out(
        self, samples: list[Sample], places: list[Place], planned: PlannedPack, rejects: tuple[Reject, ...]
    ) -> Batch:
        """The micro-batch of samples that could be read."""
        raise NotImplementedError

    def _check_measured(self, row: int, frames: int, tokens: int, labels: int) -> None:
        planned = self._rows.planned_tokens(row, frames), int(self._rows.labels[row])
        if (tokens, labels) != planned:
            raise RowError(
                "index_stale",
                f"{tokens} tokens and {labels} labels now, {planned[0]} and {planned[1]} when it was measured: "
                "its picture or video changed. Delete data.cache_dir to measure again",
            )


class PackDataset(PlannedDataset[Encoded, PackedBatch]):
    """Packs of conversations.

    Args:
        corpus: the rows.
        reduction: reweighting rule.
        augmentation_seed: seed of frames and JPEG degradation, drawn anew in each epoch; None never degrades
            (validation).
        **options: see `PlannedDataset`.
    """

    def __init__(self, corpus: Corpus, *, reduction: str, augmentation_seed: int | None, **options: Any) -> None:
        super().__init__(corpus, **options)
        self.reduction = reduction
        self.augmentation_seed = augmentation_seed

    def _encode(self, dataset: int, record: Record, epoch: int, sample: int, frames: int) -> Encoded:
        seed = self.augmentation_seed
        rng = None if seed is None else sample_rng(seed, epoch, sample)
        encoded = self.corpus.encoders[dataset].encode(record, rng, frames=frames or None)
        labels = sum(label != IGNORE_INDEX for label in encoded.labels[1:])
        self._check_measured(sample % len(self.corpus), frames, len(encoded.input_ids), labels)
        return encoded

    def _lay_out(
        self, samples: list[Encoded], places: list[Place], planned: PlannedPack, rejects: tuple[Reject, ...]
    ) -> PackedBatch:
        return pack_samples(
            samples,
            planned=planned,
            reduction=self.reduction,
            dataset_ids=[place.dataset for place in places],
            sample_ids=[place.name for place in places],
            filler_id=self.filler_id,
            tile_size=self.tile_size,
            rejects=rejects,
        )


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Rows to answer side by side; `counted` is false where a row only keeps ranks in step."""

    rows: tuple[int, ...]
    counted: tuple[bool, ...]


class PromptDataset(CorpusDataset[PromptBatch]):
    """Builds the padded prompts of a group of rows, and their expected answers.

    Args:
        corpus: the rows.
        pad_id: token on the left of shorter prompts.
        tile_size: side of a tile.
    """

    def __init__(self, corpus: Corpus, *, pad_id: int, tile_size: int) -> None:
        super().__init__(corpus)
        self.pad_id = pad_id
        self.tile_size = tile_size

    def __getitem__(self, group: PromptGroup) -> PromptBatch:
        """Raises RowError where a picture that was measured cannot be decoded: a score must not change unseen."""
        prompts, records = zip(*map(self._prompt, group.rows), strict=True)
        return pad_prompts(
            prompts,
            expected=[split_last_answer(record.row)[1] for record in records],
            records=records,
            counted=group.counted,
            pad_id=self.pad_id,
            tile_size=self.tile_size,
        )

    def _prompt(self, row: int) -> tuple[tuple[list[int], Tensor | None], Record]:
        with self.notes.note(row):
            dataset, record = self.corpus.locate(row)
            return self.corpus.encoders[dataset].encode_prompt(record), record

    def rows_of(self, item: PromptGroup) -> Sequence[int]:
        """Rows of a group."""
        return item.rows


def prompt_groups(rows: Sequence[int], *, size: int, rank: int, world_size: int) -> list[PromptGroup]:
    """This rank's groups of at most `size` rows; every rank gets the same number of groups, so that forwards match.

    A rank without a row in the last round answers a row that is not counted.
    """
    groups = []
    for start in range(0, len(rows), size * world_size):
        own = rows[start : start + size * world_size][rank::world_size]
        groups.append(PromptGroup(tuple(own), (True,) * len(own)) if own else PromptGroup((rows[0],), (False,)))
    return groups


def generation_rows(corpus: Corpus, limit: int | None) -> list[int]:
    """Rows answered in validation: evenly over the datasets, the first by content hash, so that it is the same set
    on any layout and does not follow the order of the files.
    """
    if limit == 0:
        return []
    digests, start, by_dataset = corpus.column("digest"), 0, []
    for size in corpus.sizes:
        by_dataset.append((start + np.argsort(digests[start : start + size], kind="stable")).tolist())
        start += size
    longest = max(corpus.sizes)
    turns = [rows[turn] for turn in range(longest) for rows in by_dataset if turn < len(rows)]
    return turns if limit is None else turns[:limit]
