"""Where each row of an annotation file begins and ends, found in one streaming pass over its bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_STRUCTURE = re.compile(rb'["{}\[\],]')
_IN_STRING = re.compile(rb'["\\]')


class RowSpan(NamedTuple):
    """Bytes of one row: the line it begins on, counted from 1, its offset in the file and its length."""

    line: int
    offset: int
    length: int


def row_spans(file: BinaryIO) -> Iterator[RowSpan]:
    """Find the rows of a JSONL file, or of a JSON list if the first character is `[`.

    Rows are delimited, not parsed: a broken row is one span, and the rows after it are found. Blank lines are
    passed over. A list that does not end where the file ends yields a last span of length 0.

    Args:
        file: at its beginning, seekable.
    """
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    is_list = _first_character(file) == b"["
    file.seek(start)
    yield from _ListScanner(start).scan(file) if is_list else _line_spans(file, start)


def _first_character(file: BinaryIO) -> bytes:
    while chunk := file.read(_CHUNK_BYTES):
        if match := _NOT_SPACE.search(chunk):
            return match.group()
    return b""


def _line_spans(file: BinaryIO, offset: int) -> Iterator[RowSpan]:
    for line, raw in enumerate(file, start=1):
        if length := len(raw.rstrip()):
            yield RowSpan(line, offset, length)
        offset += len(raw)


class _ListScanner:
    """Cuts a JSON list at its top-level commas. Keeps a few counters and one chunk, however long a row is."""

    def __init__(self, offset: int) -> None:
        self.chunk_offset = offset
        self.line = 1
        self.counted = 0
        self.depth = 0
        self.in_string = False
        self.closed = False
        self.row: tuple[int, int] | None = None
        """Line and offset where the row being scanned begins; None between rows."""

    def scan(self, file: BinaryIO) -> Iterator[RowSpan]:
        """Yield the span of each element."""
        position = 0
        while chunk := file.read(_CHUNK_BYTES):
            while position < len(chunk):
                position, span = self._step(chunk, position)
                if span is not None:
                    yield span
                    if span.length == 0:
                        return
            self._count_lines(chunk, len(chunk))
            # An escape at the very end of a chunk reaches into the next one.
            position -= len(chunk)
            self.chunk_offset += len(chunk)
            self.counted = 0
        yield from self._end()

    def _step(self, chunk: bytes, position: int) -> tuple[int, RowSpan | None]:
        if self.in_string:
            return self._string(chunk, position), None
        if self.row is None:
            return self._between(chunk, position)
        return self._element(chunk, position)

    def _string(self, chunk: bytes, position: int) -> int:
        match = _IN_STRING.search(chunk, position)
        if match is None:
            return len(chunk)
        if match.group() == b"\\":
            return match.end() + 1
        self.in_string = False
        return match.end()

    def _between(self, chunk: bytes, position: int) -> tuple[int, RowSpan | None]:
        match = _NOT_SPACE.search(chunk, position)
        if match is None:
            return len(chunk), None
        self._count_lines(chunk, match.start())
        offset = self.chunk_offset + match.start()
        if self.closed:
            return match.end(), RowSpan(self.line, offset, 0)
        if self.depth == 0:
            self.depth = 1
            return match.end(), None
        if match.group() == b"]":
            self.closed = True
            return match.end(), None
        if match.group() == b",":
            return match.end(), None
        self.row = (self.line, offset)
        return match.start(), None

    def _element(self, chunk: bytes, position: int) -> tuple[int, RowSpan | None]:
        match = _STRUCTURE.search(chunk, position)
        if match is None:
            return len(chunk), None
        character = match.group()
        if character == b'"':
            self.in_string = True
        elif character in b"{[":
            self.depth += 1
        elif self.depth == 1 and character in b",]":
            return match.start(), self._finish(self.chunk_offset + match.start())
        elif character in b"}]":
            # A stray closing brace must not end the list: the rows behind it would vanish unseen.
            self.depth = max(1, self.depth - 1)
        return match.end(), None

    def _finish(self, end: int) -> RowSpan:
        assert self.row is not None
        line, offset = self.row
        self.row = None
        return RowSpan(line, offset, end - offset)

    def _end(self) -> Iterator[RowSpan]:
        if self.row is not None:
            yield self._finish(self.chunk_offset)
        if not self.closed:
            yield RowSpan(self.line, self.chunk_offset, 0)

    def _count_lines(self, chunk: bytes, end: int) -> None:
        self.line += chunk.count(b"\n", self.counted, end)
        self.counted = max(self.counted, end)
