"""The numbers of each dataset: rows, spread of what they cost, part of the mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.mixture import Share
from ivl_lightning.reporting.audit.findings import DatasetFacts, Histogram, Scan, Spread, reasons
from ivl_lightning.reporting.audit.opened import Opened
from ivl_lightning.structures import Reject

MEASURES = ("tokens", "tiles", "labels")
_BINS = 30
_LOG_RATIO = 30
"""A column whose largest value is so many times its median gets bins that grow by a factor."""


def dataset_facts(
    corpus: Corpus, mixture: Sequence[Share], scans: list[Scan], opened: Opened, rejects: list[list[Reject]]
) -> list[DatasetFacts]:
    """One per dataset.

    Args:
        corpus: as indexed.
        mixture: samples of each dataset in an epoch.
        scans: of the rows.
        opened: which rows were opened.
        rejects: all of each dataset, those found when opened included.
    """
    shares = _shares(corpus, mixture)
    return [
        _facts(
            corpus,
            number,
            mixture[number].samples,
            shares[number],
            scans[number],
            opened.counts[number],
            rejects[number],
        )
        for number in range(len(corpus.specs))
    ]


def _facts(
    corpus: Corpus, number: int, samples: int, shares: dict[str, float], scan: Scan, opened: int, rejects: list[Reject]
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
        kinds=dict(scan.kinds.most_common()),
        samples=samples,
        shares=shares,
        spreads={name: spread(index.columns[name]) for name in MEASURES} if len(index) else {},
    )


def _shares(corpus: Corpus, mixture: Sequence[Share]) -> list[dict[str, float]]:
    """Parts of an epoch: a dataset's mean row as often as it is sampled; a video with half of its spare frames."""
    frame = _tokens_per_frame(corpus)
    parts: dict[str, list[float]] = {"samples": [], "tokens": [], "tiles": []}
    for index, share in zip(corpus.indexes, mixture, strict=True):
        columns, times = index.columns, share.samples / max(share.rows, 1)
        spare = float((columns["frames"] - columns["min_frames"]).sum()) / 2
        parts["samples"].append(share.samples)
        parts["tokens"].append((float(columns["tokens"].sum()) - spare * frame) * times)
        parts["tiles"].append((float(columns["tiles"].sum()) - spare) * times)
    totals = {name: sum(values) or 1.0 for name, values in parts.items()}
    return [{name: parts[name][number] / totals[name] for name in parts} for number in range(len(mixture))]


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
