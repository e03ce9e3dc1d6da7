"""Encoded preference pairs side by side -> one packed micro-batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.collate import all_tiles
from ivl_lightning.structures import EncodedPair, PlannedPack, PreferenceBatch, Reject


def pack_pairs(
    pairs: Sequence[EncodedPair],
    *,
    planned: PlannedPack,
    dataset_ids: Sequence[int],
    sample_ids: Sequence[str],
    sample_rows: Sequence[int],
    reference_logps: Sequence[tuple[float, float]],
    filler_id: int,
    tile_size: int,
    rejects: tuple[Reject, ...] = (),
    shared_prefix: bool = True,
) -> PreferenceBatch:
    """Lay pairs end to end, each as `[prompt | chosen | rejected]`.

    A supervised token is predicted from the position before it in its conversation: the first one of either answer
    from the last position of the prompt.

    Args:
        pairs: D pairs; none gives one filler token without a label, so that every rank has a micro-batch.
        planned: the batch's place in the run.
        dataset_ids: dataset number of each pair.
        sample_ids: name of each pair for error messages.
        sample_rows: corpus row of each pair.
        reference_logps: of each pair's chosen and rejected answer; NaN where not known.
        filler_id: token of an empty micro-batch.
        tile_size: side S of the tiles, for a batch without tiles.
        rejects: pairs of the pack that could not be read.
        shared_prefix: false lays both conversations out whole, `[prompt | chosen]` and `[prompt | rejected]`, each
            with tiles of its own: the plain way, which costs about twice as much and gives the same.
    """
    row = _Row()
    tiles: list[Tensor | None] = []
    for number, pair in enumerate(pairs):
        row.add_pair(number, pair, shared_prefix=shared_prefix)
        tiles += [pair.pixel_values] * (1 if shared_prefix else 2)
    if not pairs:
        row.add_segment([filler_id], 0, [])
        row.ends.append(1)
    answers = [(pair.chosen_labels, pair.rejected_labels) for pair in pairs]
    counts = [[len(labels) - labels.count(IGNORE_INDEX) for labels in pair] for pair in answers]
    return PreferenceBatch(
        input_ids=torch.tensor([row.ids]),
        position_ids=torch.tensor([row.positions]),
        cu_seqlens=_cumulative([0, *row.ends]),
        cu_queries=_cumulative(accumulate(row.queries, initial=0)),
        cu_keys=_cumulative(accumulate(row.keys, initial=0)),
        key_rows=torch.tensor(row.key_rows),
        pixel_values=all_tiles(tiles, tile_size),
        loss_rows=torch.tensor(row.loss_rows, dtype=torch.int64),
        loss_targets=torch.tensor(row.loss_targets, dtype=torch.int64),
        loss_responses=torch.tensor(row.loss_responses, dtype=torch.int64),
        response_tokens=torch.tensor(counts, dtype=torch.float32).view(-1, 2),
        reference_logps=torch.tensor(list(reference_logps), dtype=torch.float32).view(-1, 2),
        sample_ids=tuple(sample_ids),
        sample_datasets=tuple(dataset_ids),
        sample_tiles=tuple(0 if pair.pixel_values is None else len(pair.pixel_values) for pair in pairs),
        sample_rows=tuple(sample_rows),
        checksums=tuple(checksum(pair) for pair in pairs),
        planned=planned,
        rejects=rejects,
    )


def checksum(pair: EncodedPair) -> int:
    """32 bits over all ids and pixels of a pair: the same input has the same."""
    lengths = [len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)]
    ids = torch.tensor([*lengths, *pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids], dtype=torch.int64)
    value = zlib.crc32(ids.numpy().data)
    return value if pair.pixel_values is None else zlib.crc32(pair.pixel_values.contiguous().numpy().data, value)


def _cumulative(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


@dataclass(slots=True)
class _Row:
    """The packed row while it grows; see `PreferenceBatch`."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    key_rows: list[int] = field(default_factory=list)
    loss_rows: list[int] = field(default_factory=list)
    loss_targets: list[int] = field(default_factory=list)
    loss_responses: list[int] = field(default_factory=list)

    def add_pair(self, number: int, pair: EncodedPair, *, shared_prefix: bool) -> None:
        """Append a pair's segments and its supervised positions."""
        start, length = len(self.ids), len(pair.prompt_ids)
        answers = ((pair.chosen_ids, pair.chosen_labels), (pair.rejected_ids, pair.rejected_labels))
        if shared_prefix:
            self.add_segment(pair.prompt_ids, 0, [])
        for response, (ids, labels) in enumerate(answers, start=2 * number):
            if shared_prefix:
                first = self.add_segment(ids, length, range(start, start + length))
                before = start + length - 1
            else:
                first = self.add_segment([*pair.prompt_ids, *ids], 0, []) + length
                before = first - 1
            self._supervise(labels, first, before, response)
        self.ends.append(len(self.ids))

    def add_segment(self, ids: Sequence[int], position: int, seen: Sequence[int]) -> int:
        """Append tokens that see rows `seen` and, causally, themselves; returns the row of the first."""
        start = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.queries.append(len(ids))
        self.keys.append(len(seen) + len(ids))
        self.key_rows += [*seen, *range(start, start + len(ids))]
        return start

    def _supervise(self, labels: Sequence[int], first: int, before: int, response: int) -> None:
        for place, label in enumerate(labels):
            if label != IGNORE_INDEX:
                self.loss_rows.append(first + place - 1 if place else before)
                self.loss_targets.append(label)
                self.loss_responses.append(response)
