"""One pass over every usable row: quality rules, duplicates, and what picture headers say. No pixel is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.annotations import RowMedia, media_of
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.ledger import reject
from ivl_lightning.data.media import MediaReader
from ivl_lightning.data.quality import DUPLICATE, Hit, check_turns, excerpt
from ivl_lightning.reporting.audit.findings import Remark, Scan, place
from ivl_lightning.reporting.audit.flagged import Flagged, flag
from ivl_lightning.reporting.audit.headers import is_remote, note_headers
from ivl_lightning.reporting.audit.keys import duplicates, most_frequent, row_key, text_key
from ivl_lightning.reporting.audit.progress import tracked
from ivl_lightning.reporting.audit.rejected import note_rejects
from ivl_lightning.structures import Record, Reject, RowError, RowKey, Turn

SAME_IMAGES, SAME_ANSWERS = "same_images", "same_answers"
_DUPLICATE_EXCERPT = 60
"""Characters of a duplicate's answer: the whole stands in the row it repeats."""


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What the pass found.

    Attributes:
        scans: one per dataset.
        flagged: rows that break a quality rule, sorted by dataset and line.
        checked: rows that were read.
        broken: row -> why it could be measured, but not read again.
        uncertain: rejected rows that are too long by approximate token counts alone.
    """

    scans: list[Scan]
    flagged: list[Flagged]
    checked: int
    broken: dict[int, Reject]
    uncertain: frozenset[RowKey]


@dataclass(slots=True)
class _Keys:
    """16 + 8 + 8 bytes a row: the whole row, its pictures (0 for none), its last answer."""

    rows: NDArray[np.uint64]
    images: NDArray[np.uint64]
    answers: NDArray[np.uint64]


def scan_rows(corpus: Corpus, *, exact: bool, show: bool) -> ScanResult:
    """Read every usable row of the corpus, and the rejected ones for what media they ask for.

    Args:
        corpus: as indexed.
        exact: whether token counts are those of the model.
        show: a progress bar.
    """
    count = len(corpus)
    keys = _Keys(np.empty((count, 2), np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.uint64))
    scans = [Scan() for _ in corpus.specs]
    uncertain = note_rejects(corpus, scans, exact=exact)
    tiles = corpus.column("tiles")
    flagged: list[Flagged] = []
    broken: dict[int, Reject] = {}
    for row in tracked(range(count), "reading rows", count, show=show):
        # A key of its own, for rows that do not come as far as having one.
        keys.rows[row] = row, 0
        dataset, record = corpus.place(row)
        try:
            record = corpus.locate(row)[1]
            hits = _scan_row(corpus, row, record, scans[dataset], int(tiles[row]), keys)
        except RowError as error:
            broken[row] = reject(record, error)
            continue
        flagged += [flag(record, hit) for hit in hits]
    flagged += _duplicates(corpus, keys.rows)
    _note_frequent(corpus, keys, scans)
    order = {spec.name: number for number, spec in enumerate(corpus.specs)}
    flagged.sort(key=lambda line: (order[line.dataset], line.line, line.rule))
    return ScanResult(scans, flagged, count, broken, uncertain)


def _scan_row(corpus: Corpus, row: int, record: Record, scan: Scan, tiles: int, keys: _Keys) -> tuple[Hit, ...]:
    encoder, media = corpus.encoders[corpus.dataset_of(row)], media_of(record.row)
    turns = encoder.turns(record.row)
    scan.kinds[media.kind] += 1
    if is_remote(media, encoder.reader):
        # Fetched once to measure them; those of opened rows are looked at when they are opened.
        scan.unchecked += len(media.images)
    else:
        note_headers(scan, encoder, record, media, tiles)
    _note_keys(keys, row, turns, _places(media, encoder.reader))
    return check_turns(encoder.learned_turns(record.row))


def _places(media: RowMedia, reader: MediaReader) -> list[str]:
    if media.video is None:
        return [reader.resolve(path) for path in media.images]
    # Two rows may ask the same of two parts of one video.
    return [reader.resolve(media.video), str(media.clip)]


def _note_keys(keys: _Keys, row: int, turns: tuple[Turn, ...], places: list[str]) -> None:
    keys.rows[row] = np.frombuffer(row_key(turns, places), dtype="<u8")
    keys.images[row] = text_key(places) if places else 0
    keys.answers[row] = text_key([turns[-1].text.strip()])


def _note_frequent(corpus: Corpus, keys: _Keys, scans: list[Scan]) -> None:
    """How many rows of a dataset share their most frequent picture, and their most frequent answer."""
    start = 0
    for encoder, scan, size in zip(corpus.encoders, scans, corpus.sizes, strict=True):
        images, answers = keys.images[start : start + size], keys.answers[start : start + size]
        with_images = np.flatnonzero(images)
        rows, first = most_frequent(images[with_images])
        if rows:
            record = corpus.locate(start + int(with_images[first]))[1]
            paths = media_of(record.row)
            shown = ", ".join(paths.images or (paths.video or "",))
            scan.remarks[SAME_IMAGES] = Remark(rows, f"{place(record)}: {excerpt(shown)}")
        rows, first = most_frequent(answers)
        if rows:
            record = corpus.locate(start + first)[1]
            answer = encoder.turns(record.row)[-1].text
            scan.remarks[SAME_ANSWERS] = Remark(rows, f"{place(record)}: {excerpt(answer)}")
        start += size


def _duplicates(corpus: Corpus, keys: NDArray[np.uint64]) -> list[Flagged]:
    found = []
    for later, first in zip(*duplicates(keys), strict=True):
        record, original = corpus.locate(int(later))[1], corpus.locate(int(first))[1]
        text = excerpt(corpus.encoders[corpus.dataset_of(int(later))].turns(record.row)[-1].text)
        short = text if len(text) <= _DUPLICATE_EXCERPT else f"{text[:_DUPLICATE_EXCERPT]}..."
        found.append(flag(record, Hit(DUPLICATE, short, 1, 0), f"{original.dataset}, {place(original)}"))
    return found
