"""Rows that are opened for real: pictures decoded, cut and degraded as in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ivl_lightning.data.annotations import media_of
from ivl_lightning.data.augmentation import sample_rng
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.ledger import reject
from ivl_lightning.reporting.audit.findings import Scan
from ivl_lightning.reporting.audit.headers import is_remote, note_headers
from ivl_lightning.reporting.audit.progress import tracked
from ivl_lightning.reporting.audit.tiles import ShownImage, shown_images
from ivl_lightning.reporting.audit.token_text import Span, token_spans
from ivl_lightning.structures import Encoded, Record, Reject, RowError


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it.

    Attributes:
        line, id: the row.
        tokens, labels, tiles: what it costs.
        images: its pictures as tiles.
        spans: its text as tokens.
    """

    line: int
    id: str | None
    tokens: int
    labels: int
    tiles: int
    images: list[ShownImage]
    spans: list[Span]

    def as_json(self) -> dict[str, object]:
        """Everything but the pixels."""
        numbers = {name: getattr(self, name) for name in ("line", "id", "tokens", "labels", "tiles", "spans")}
        return {**numbers, "images": [{"name": image.name, "note": image.note} for image in self.images]}


@dataclass(frozen=True, slots=True)
class Opened:
    """Outcome of opening rows.

    Attributes:
        counts: rows opened, one number per dataset.
        broken: row -> why it cannot be used after all.
        examples: rows to show, one list per dataset.
    """

    counts: list[int]
    broken: dict[int, Reject]
    examples: list[list[Example]]


def open_rows(corpus: Corpus, scans: list[Scan], *, rows: int | None, examples: int, seed: int, show: bool) -> Opened:
    """Open rows of each dataset; the same ones each time, whatever the order of the file.

    Args:
        corpus: as indexed.
        scans: of each dataset; the headers of pictures behind URLs are noted there.
        rows: of each dataset, those with the smallest content hashes; None opens all.
        examples: of each dataset, the first of them.
        seed: of the augmentation.
        show: a progress bar.
    """
    chosen = list(_chosen(corpus, rows))
    opened = Opened([0] * len(corpus.specs), {}, [[] for _ in corpus.specs])
    for row in tracked(chosen, "opening rows", len(chosen), show=show):
        dataset, record = corpus.place(row)
        encoder = corpus.encoders[dataset]
        opened.counts[dataset] += 1
        try:
            record = corpus.locate(row)[1]
            encoded = encoder.encode(record, sample_rng(seed, 0, row))
            _note_remote(scans[dataset], encoder, record, encoded)
            if len(opened.examples[dataset]) < examples:
                opened.examples[dataset].append(_example(encoder, record, encoded))
        except RowError as error:
            opened.broken[row] = reject(record, error)
    return opened


def _note_remote(scan: Scan, encoder: RowEncoder, record: Record, encoded: Encoded) -> None:
    media = media_of(record.row)
    if is_remote(media, encoder.reader):
        note_headers(scan, encoder, record, media, 0 if encoded.pixel_values is None else len(encoded.pixel_values))
        scan.unchecked -= len(media.images)


def _chosen(corpus: Corpus, rows: int | None) -> Iterator[int]:
    start = 0
    for index, size in zip(corpus.indexes, corpus.sizes, strict=True):
        for position in np.argsort(index.columns["digest"], kind="stable")[:rows]:
            yield start + int(position)
        start += size


def _example(encoder: RowEncoder, record: Record, encoded: Encoded) -> Example:
    pixels = encoded.pixel_values
    spans = token_spans(encoded.input_ids, encoded.labels, encoder.tokenizer, encoder.settings.tokens_per_tile)
    return Example(
        line=record.line,
        id=record.id,
        tokens=len(encoded.input_ids),
        labels=encoder.measure(record).labels,
        tiles=0 if pixels is None else len(pixels),
        images=shown_images(encoder, record, pixels),
        spans=spans,
    )
