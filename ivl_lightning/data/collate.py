"""Encoded samples side by side -> one packed micro-batch; prompts -> one left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.reweighting import label_weight
from ivl_lightning.structures import Encoded, PackedBatch, PlannedPack, PromptBatch, Record, Reject


def pack_samples(
    samples: Sequence[Encoded],
    *,
    planned: PlannedPack,
    reduction: str,
    dataset_ids: Sequence[int],
    sample_ids: Sequence[str],
    filler_id: int,
    tile_size: int,
    rejects: tuple[Reject, ...] = (),
) -> PackedBatch:
    """Lay documents end to end.

    A supervised token is predicted from the position before it in the same document; a label on a document's first
    token has no such position and is never trained (docs/differences.md). Label weights count the labels that are.

    Args:
        samples: D documents; none gives one filler token without a label, so that every rank has a micro-batch.
        planned: the batch's place in the run.
        reduction: reweighting rule.
        dataset_ids: dataset number of each document.
        sample_ids: name of each document for error messages.
        filler_id: token of an empty micro-batch.
        tile_size: side S of the tiles, for a batch without tiles.
        rejects: samples of the pack that could not be read.
    """
    documents = [(sample.input_ids, sample.labels) for sample in samples] or [([filler_id], [IGNORE_INDEX])]
    lengths = [len(ids) for ids, _ in documents]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    rows: list[int] = []
    weights: list[float] = []
    datasets: list[int] = []
    for (_, own), start, dataset in zip(documents, starts[:-1], [*dataset_ids] or [0], strict=True):
        trained = [start + position - 1 for position in range(1, len(own)) if own[position] != IGNORE_INDEX]
        rows += trained
        weights += [label_weight(len(trained), reduction)] * len(trained)
        datasets += [dataset] * len(trained)
    labels = torch.tensor([label for _, own in documents for label in own])
    loss_rows = torch.tensor(rows, dtype=torch.int64)
    return PackedBatch(
        input_ids=torch.tensor([[token for ids, _ in documents for token in ids]]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        labels=labels.unsqueeze(0),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        pixel_values=all_tiles([sample.pixel_values for sample in samples], tile_size),
        loss_rows=loss_rows,
        loss_targets=labels[loss_rows + 1],
        loss_weights=torch.tensor(weights, dtype=torch.float32),
        loss_datasets=torch.tensor(datasets, dtype=torch.int64),
        sample_ids=tuple(sample_ids),
        sample_datasets=tuple(dataset_ids),
        sample_tiles=tuple(0 if sample.pixel_values is None else len(sample.pixel_values) for sample in samples),
        planned=planned,
        rejects=rejects,
    )


def documents_of(batch: PackedBatch) -> Tensor:
    """Number of the document that each supervised row lies in, int64 `[n]`."""
    # Boundaries lie on the CPU; their way to the device must not wait for what runs there.
    ends = batch.cu_seqlens[1:].to(batch.loss_rows, non_blocking=True)
    return torch.bucketize(batch.loss_rows, ends, right=True)


def pad_prompts(
    prompts: Sequence[tuple[list[int], Tensor | None]],
    *,
    expected: Sequence[str],
    records: Sequence[Record],
    counted: Sequence[bool],
    pad_id: int,
    tile_size: int,
) -> PromptBatch:
    """Prompts padded on the left, so that generation continues every row at its end."""
    longest = max(len(ids) for ids, _ in prompts)
    padding = [longest - len(ids) for ids, _ in prompts]
    return PromptBatch(
        input_ids=torch.tensor([[pad_id] * pad + ids for (ids, _), pad in zip(prompts, padding, strict=True)]),
        attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]),
        pixel_values=all_tiles([tiles for _, tiles in prompts], tile_size),
        tiles=tuple(0 if tiles is None else len(tiles) for _, tiles in prompts),
        expected=tuple(expected),
        records=tuple(records),
        counted=tuple(counted),
    )


def all_tiles(tiles: Sequence[Tensor | None], tile_size: int) -> Tensor:
    """Tiles of all samples in order, uint8 `[N, 3, S, S]`; N is 0 where none has any."""
    present = [tile for tile in tiles if tile is not None]
    return torch.cat(present) if present else torch.empty(0, 3, tile_size, tile_size, dtype=torch.uint8)
