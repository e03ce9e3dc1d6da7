"""The numbers of each dataset: rows, spread of what they cost, part of the mixture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.mixture import Share
from ivl_lightning.data.plan import spare_frames
from ivl_lightning.data.stream import mixture_of
from ivl_lightning.reporting.audit.findings import DatasetFacts, Histogram, Scan, Spread, reasons
from ivl_lightning.reporting.audit.opened import Opened
from ivl_lightning.structures import Reject

MEASURES = ("tokens", "tiles", "labels")
_BINS = 30
_LOG_RATIO = 30
"""A column whose largest value is so many times its median gets bins that grow by a factor."""


def dataset_facts(
    corpus: Corpus,
    train: Corpus,
    config: DataConfig,
    scans: list[Scan],
    opened: Opened,
    rejects: list[list[Reject]],
) -> list[DatasetFacts]:
    """One per dataset.

    Args:
        corpus: as indexed.
        train: the rows of it that train.
        config: of the mixture.
        scans: of the rows.
        opened: which rows were opened.
        rejects: all of each dataset, those found when opened included.
    """
    mixture = {share.name: share for share in mixture_of(train, config)}
    shares = _shares(train, mixture, config.max_frames)
    broken = Counter(line.dataset for line in opened.broken.values())
    return [
        _facts(
            corpus,
            number,
            scans[number],
            rejects[number],
            opened=opened.counts[number],
            broken=broken[spec.name],
            held_back=corpus.sizes[number] - train.sizes[number],
            samples=mixture[spec.name].samples if spec.name in mixture else 0,
            shares=shares[number],
        )
        for number, spec in enumerate(corpus.specs)
    ]


def _facts(
    corpus: Corpus,
    number: int,
    scan: Scan,
    rejects: list[Reject],
    *,
    opened: int,
    broken: int,
    held_back: int,
    samples: int,
    shares: dict[str, float],
) -> DatasetFacts:
    spec, index = corpus.specs[number], corpus.indexes[number]
    rows = len(index) + len(index.rejects)
    return DatasetFacts(
        name=spec.name,
        annotation=spec.annotation,
        root=spec.root,
        data_augment=spec.data_augment,
        max_dynamic_patch=spec.max_dynamic_patch,
        repeat_time=spec.repeat_time,
        rows=rows,
        used=rows - len(rejects),
        rejected=reasons(rejects),
        set_aside=sum(not line.counted for line in rejects),
        opened=opened,
        broken=broken,
        held_back=held_back,
        kinds=dict(scan.kinds.most_common()),
        unchecked=scan.unchecked,
        samples=samples,
        shares=shares,
        spreads={name: spread(index.columns[name]) for name in MEASURES} if len(index) else {},
    )


def _shares(corpus: Corpus, mixture: Mapping[str, Share], max_frames: int) -> list[dict[str, float]]:
    """Parts of an epoch: a dataset's mean row as often as it is sampled; a video with the frames of a mean draw."""
    frame = _tokens_per_frame(corpus)
    parts: dict[str, list[float]] = {"samples": [], "tokens": [], "tiles": []}
    for index in corpus.indexes:
        columns, share = index.columns, mixture.get(index.name)
        samples = share.samples if share else 0
        times = samples / max(len(index), 1)
        spare = float(spare_frames(columns["frames"], columns["min_frames"], max_frames).sum())
        parts["samples"].append(samples)
        parts["tokens"].append((float(columns["tokens"].sum()) - spare * frame) * times)
        parts["tiles"].append((float(columns["tiles"].sum()) - spare) * times)
    totals = {name: sum(values) or 1.0 for name, values in parts.items()}
    return [{name: parts[name][number] / totals[name] for name in parts} for number in range(len(corpus.indexes))]


def _tokens_per_frame(corpus: Corpus) -> float:
    if not corpus.column("frames").any():
        return 0.0
    table = corpus.encoders[0].frame_tokens
    # Of one frame there is nothing to spare.
    return float(table[-1]) / max(len(table) - 2, 1)


def spread(values: NDArray[np.int64]) -> Spread:
    """How the values are spread; there is at least one."""
    return Spread(
        total=int(values.sum()),
        smallest=int(values.min()),
        median=float(np.median(values)),
        mean=float(values.mean()),
        p95=float(np.percentile(values, 95)),
        largest=int(values.max()),
        histogram=histogram(values),
    )


def histogram(values: NDArray[np.int64]) -> Histogram:
    """Counts in bins of equal width; where a few values are far above the rest, of equal ratio.

    Few whole numbers get a bin each, centered on the number: 1, 1, 3 gives edges 0.5, 1.5, 2.5, 3.5, counts 2, 0, 1.
    """
    low, high = int(values.min()), int(values.max())
    log = low > 0 and high > _LOG_RATIO * float(np.median(values))
    if high - low < _BINS:
        edges, log = np.arange(low, high + 2) - 0.5, False
    elif log:
        edges = np.geomspace(low, high, _BINS + 1)
    else:
        edges = np.linspace(low, high, _BINS + 1)
    # Rounding may leave the largest value outside of the last bin.
    edges[-1] = max(edges[-1], high)
    counts, _ = np.histogram(values, edges)
    return Histogram(edges=edges.tolist(), counts=counts.tolist(), log=log)
