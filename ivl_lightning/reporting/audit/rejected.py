"""Rejected rows read once more: what media they ask for, and whether they are surely too long."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ivl_lightning.data.annotations import AnnotationFile, RowMedia, media_of
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.index import DatasetIndex
from ivl_lightning.reporting.audit.findings import Scan
from ivl_lightning.reporting.audit.headers import is_remote, most_tiles
from ivl_lightning.structures import Reject, RowError, RowKey

OVER_LENGTH = "over_length"
LONG_PICTURES = "over_length_pictures"
_CHUNK_ROWS = 256


def note_rejects(corpus: Corpus, scans: list[Scan], *, exact: bool) -> frozenset[RowKey]:
    """Count the media of the rejected rows, which are missing or broken as often as not.

    Args:
        corpus: as indexed.
        scans: of each dataset.
        exact: whether token counts are those of the model.

    Returns:
        Rows over a cap by token counts that are not exact.
    """
    uncertain: set[RowKey] = set()
    for encoder, index, scan in zip(corpus.encoders, corpus.indexes, scans, strict=True):
        for line, media in _media(index):
            scan.kinds[media.kind] += 1
            if line.reason != OVER_LENGTH:
                continue
            if media.images:
                scan.remark(LONG_PICTURES, f"line {line.line}")
            if not exact and not _has_too_many_tiles(encoder, media):
                uncertain.add(line.row)
    return frozenset(uncertain)


def _media(index: DatasetIndex) -> Iterator[tuple[Reject, RowMedia]]:
    """Rejects that count, with their media; those of which the media cannot be known are passed over."""
    lines = {line.offset: line for line in index.rejects if line.counted}
    if not lines:
        return
    file = AnnotationFile(index.file)
    spans = (span for span in file.iter_lines() if span.offset in lines)
    while chunk := tuple(islice(spans, _CHUNK_ROWS)):
        for span, raw in zip(chunk, file.read_spans(chunk), strict=True):
            media = _media_of(raw)
            if media is not None:
                yield lines[span.offset], media


def _media_of(raw: bytes) -> RowMedia | None:
    try:
        return media_of(AnnotationFile.parse(raw))
    except RowError:
        # The row is on the list of rejects for it.
        return None


def _has_too_many_tiles(encoder: RowEncoder, media: RowMedia) -> bool:
    """Whether the tiles of the row's pictures alone pass a cap, whatever its text costs."""
    settings = encoder.settings
    if not media.images or is_remote(media, encoder.reader):
        return False
    try:
        tiles = most_tiles(encoder, media.images, 1 if settings.over_length == "shrink" else None)
    except RowError:
        # It was readable a moment ago; without it nothing is certain.
        return False
    return tiles > settings.max_pack_tiles or tiles * settings.tokens_per_tile > settings.max_tokens
