"""One pass over every usable row: quality rules, duplicates, and what picture headers say. No pixel is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.annotations import RowMedia, media_of
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.ledger import reject
from ivl_lightning.data.locations import url_scheme
from ivl_lightning.data.measuring import digest_text
from ivl_lightning.data.media import MediaReader
from ivl_lightning.data.quality import (
    ANSWER_LENGTH,
    DUPLICATE,
    REPEATED_LINES,
    REPEATED_NGRAMS,
    SENTENCE_LENGTH,
    ZEROS,
    Hit,
    check_turns,
    duplicates,
    excerpt,
    most_frequent,
    row_key,
    text_key,
)
from ivl_lightning.data.turns import parse_turns
from ivl_lightning.reporting.audit.findings import Flagged, Remark, Scan, place
from ivl_lightning.reporting.audit.progress import tracked
from ivl_lightning.structures import Record, Reject, RowError, Turn

EXIF, GRAY16, SMALL, STRETCHED = "exif_rotated", "gray16", "small_picture", "extreme_aspect"
SAME_IMAGES, SAME_ANSWERS = "same_images", "same_answers"
SMALLEST_SIDE = 28
"""Pixels; a token of the model covers 28 x 28 pixels of a tile."""
LARGEST_ASPECT = 10
_UPRIGHT = (0, 1)

_MESSAGES = {
    REPEATED_LINES: "{value:.0%} of the lines repeat an earlier line, more than {limit:.0%}",
    REPEATED_NGRAMS: "{value:.0%} of the 10-grams repeat an earlier one, more than {limit:.0%}",
    SENTENCE_LENGTH: "a sentence of {value:,.0f} characters, more than {limit:,.0f}",
    ANSWER_LENGTH: "an answer of {value:,.0f} characters, more than {limit:,.0f}",
    ZEROS: "a run of {value:,.0f} zeros, more than {limit:,.0f}",
}


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What the pass found.

    Attributes:
        scans: one per dataset.
        flagged: rows that break a quality rule, sorted by dataset and line.
        checked: rows that were read.
        broken: row -> why it could be measured, but not read again.
    """

    scans: list[Scan]
    flagged: list[Flagged]
    checked: int
    broken: dict[int, Reject]


@dataclass(slots=True)
class _Keys:
    """16 + 8 + 8 bytes a row: the whole row, its pictures (0 for none), its last answer."""

    rows: NDArray[np.uint64]
    images: NDArray[np.uint64]
    answers: NDArray[np.uint64]


def scan_rows(corpus: Corpus, *, show: bool) -> ScanResult:
    """Read every usable row of the corpus.

    Args:
        corpus: as indexed.
        show: a progress bar.
    """
    count = len(corpus)
    keys = _Keys(np.empty((count, 2), np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.uint64))
    scans = [Scan() for _ in corpus.specs]
    flagged: list[Flagged] = []
    broken: dict[int, Reject] = {}
    for row in tracked(range(count), "reading rows", count, show=show):
        # A key of its own, for rows that do not come as far as having one.
        keys.rows[row] = row, 0
        dataset, record = corpus.locate(row)
        try:
            hits = _scan_row(corpus, row, record, scans[dataset], keys)
        except RowError as error:
            broken[row] = reject(record, error)
            continue
        flagged += [_flagged(corpus, row, record, hit) for hit in hits]
    flagged += _duplicates(corpus, keys.rows)
    _note_frequent(corpus, keys, scans)
    order = {spec.name: number for number, spec in enumerate(corpus.specs)}
    flagged.sort(key=lambda line: (order[line.dataset], line.line, line.rule))
    return ScanResult(scans, flagged, count, broken)


def _scan_row(corpus: Corpus, row: int, record: Record, scan: Scan, keys: _Keys) -> tuple[Hit, ...]:
    turns, media = parse_turns(record.row), media_of(record.row)
    reader = corpus.encoders[corpus.dataset_of(row)].reader
    _note_pictures(scan, record, media, reader)
    scan.kinds[media.kind] += 1
    _note_keys(keys, row, turns, _places(media, reader))
    return check_turns(turns)


def _places(media: RowMedia, reader: MediaReader) -> list[str]:
    if media.video is None:
        return [reader.resolve(path) for path in media.images]
    # Two rows may ask the same of two parts of one video.
    return [reader.resolve(media.video), str(media.clip)]


def _note_keys(keys: _Keys, row: int, turns: tuple[Turn, ...], places: list[str]) -> None:
    keys.rows[row] = np.frombuffer(row_key(turns, places), dtype="<u8")
    keys.images[row] = text_key(places) if places else 0
    keys.answers[row] = text_key([turns[-1].text.strip()])


def _note_pictures(scan: Scan, record: Record, media: RowMedia, reader: MediaReader) -> None:
    """What headers tell, each once a row. Pictures behind a URL were fetched once to measure them; not again."""
    found = {name for path in media.images if _is_local(path, reader) for name in _remarks(path, reader)}
    for name in sorted(found):
        scan.remark(name, place(record))


def _is_local(path: str, reader: MediaReader) -> bool:
    return url_scheme(path) is None and url_scheme(reader.root) is None


def _remarks(path: str, reader: MediaReader) -> Iterator[str]:
    header = reader.header(path)
    short, long = sorted((header.width, header.height))
    if header.orientation not in _UPRIGHT and not reader.exif_transpose:
        yield EXIF
    if header.mode.startswith("I;16") and reader.gray16 == "clip":
        yield GRAY16
    if short < SMALLEST_SIDE:
        yield SMALL
    if long > LARGEST_ASPECT * short:
        yield STRETCHED


def _note_frequent(corpus: Corpus, keys: _Keys, scans: list[Scan]) -> None:
    """How many rows of a dataset share their most frequent picture, and their most frequent answer."""
    start = 0
    for scan, size in zip(scans, corpus.sizes, strict=True):
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
            answer = parse_turns(record.row)[-1].text
            scan.remarks[SAME_ANSWERS] = Remark(rows, f"{place(record)}: {excerpt(answer)}")
        start += size


def _duplicates(corpus: Corpus, keys: NDArray[np.uint64]) -> list[Flagged]:
    found = []
    for later, first in zip(*duplicates(keys), strict=True):
        record = corpus.locate(int(later))[1]
        original = corpus.locate(int(first))[1]
        message = f"the same media, questions and answers as {original.dataset}, {place(original)}"
        text = excerpt(parse_turns(record.row)[-1].text)
        found.append(_flag(corpus, int(later), record, Hit(DUPLICATE, text, 1, 0), message))
    return found


def _flagged(corpus: Corpus, row: int, record: Record, hit: Hit) -> Flagged:
    message = _MESSAGES[hit.rule].format(value=hit.value, limit=hit.limit) if hit.value else "the answer is empty"
    return _flag(corpus, row, record, hit, message)


def _flag(corpus: Corpus, row: int, record: Record, hit: Hit, message: str) -> Flagged:
    dataset = corpus.dataset_of(row)
    digest = int(corpus.indexes[dataset].columns["digest"][row - sum(corpus.sizes[:dataset])])
    return Flagged(
        dataset=record.dataset,
        file=record.file,
        line=record.line,
        id=record.id,
        digest=digest_text(digest),
        rule=hit.rule,
        text=hit.text,
        value=hit.value,
        limit=hit.limit,
        message=message,
    )
