"""Map-style datasets: a planned pack, or a group of prompts, -> tensors. Nothing here knows ranks or order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.augmentation import sample_rng
from ivl_lightning.data.collate import pack_samples, pad_prompts
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.ledger import reject
from ivl_lightning.data.turns import split_last_answer
from ivl_lightning.structures import Encoded, PackedBatch, PlannedPack, PromptBatch, Record, Reject, RowError, RowKey


class PackDataset(Dataset[PackedBatch]):
    """Builds the micro-batch of a planned pack.

    Args:
        corpus: the rows.
        reduction: reweighting rule.
        tile_size: side of a tile.
        filler_id: token of an empty micro-batch.
        augmentation_seed: seed of JPEG degradation; None never degrades (validation).
        left_out: rows that broke before; they are not tried again, so that a resumed run trains on what the run it
            continues would have.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        reduction: str,
        tile_size: int,
        filler_id: int,
        augmentation_seed: int | None,
        left_out: frozenset[RowKey] = frozenset(),
    ) -> None:
        self.corpus = corpus
        self.reduction = reduction
        self.tile_size = tile_size
        self.filler_id = filler_id
        self.augmentation_seed = augmentation_seed
        self.left_out = left_out
        self._rows = corpus.plan_rows

    def __getitem__(self, planned: PlannedPack) -> PackedBatch:
        """A sample that cannot be read is left out and reported; the pack goes on without it."""
        samples: list[Encoded] = []
        datasets: list[int] = []
        names: list[str] = []
        rejects: list[Reject] = []
        frames = planned.pack.frames or (0,) * len(planned.pack.samples)
        for sample, count in zip(planned.pack.samples, frames, strict=True):
            row = sample % len(self.corpus)
            dataset, record = self.corpus.place(row)
            if (record.dataset, record.offset, record.digest) in self.left_out:
                continue
            try:
                record = self.corpus.locate(row)[1]
                samples.append(self._encode(dataset, record, planned.epoch, sample, count))
            except RowError as error:
                rejects.append(reject(record, error, trained=True))
                continue
            datasets.append(dataset)
            names.append(f"{record.dataset} {record.file}:{record.line}")
        return pack_samples(
            samples,
            planned=planned,
            reduction=self.reduction,
            dataset_ids=datasets,
            sample_ids=names,
            filler_id=self.filler_id,
            tile_size=self.tile_size,
            rejects=tuple(rejects),
        )

    def _encode(self, dataset: int, record: Record, epoch: int, sample: int, frames: int) -> Encoded:
        seed = self.augmentation_seed
        rng = None if seed is None else sample_rng(seed, epoch, sample)
        encoder = self.corpus.encoders[dataset]
        encoded = encoder.encode(record, rng, frames=frames or None)
        row = sample % len(self.corpus)
        planned = self._rows.planned_tokens(row, frames), int(self._rows.labels[row])
        found = len(encoded.input_ids), sum(label != IGNORE_INDEX for label in encoded.labels[1:])
        if found != planned:
            raise RowError(
                "index_stale",
                f"{found[0]} tokens and {found[1]} labels now, {planned[0]} and {planned[1]} when it was measured: "
                "its picture or video changed. Delete data.cache_dir to measure again",
            )
        return encoded


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Rows to answer side by side; `counted` is false where a row only keeps ranks in step."""

    rows: tuple[int, ...]
    counted: tuple[bool, ...]


class PromptDataset(Dataset[PromptBatch]):
    """Builds the padded prompts of a group of rows, and their expected answers.

    Args:
        corpus: the rows.
        pad_id: token on the left of shorter prompts.
        tile_size: side of a tile.
    """

    def __init__(self, corpus: Corpus, *, pad_id: int, tile_size: int) -> None:
        self.corpus = corpus
        self.pad_id = pad_id
        self.tile_size = tile_size

    def __getitem__(self, group: PromptGroup) -> PromptBatch:
        """Raises RowError where a picture that was measured cannot be decoded: a score must not change unseen."""
        located = [self.corpus.locate(row) for row in group.rows]
        prompts = [self.corpus.encoders[dataset].encode_prompt(record) for dataset, record in located]
        return pad_prompts(
            prompts,
            expected=[split_last_answer(record.row)[1] for _, record in located],
            records=[record for _, record in located],
            counted=group.counted,
            pad_id=self.pad_id,
            tile_size=self.tile_size,
        )


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
