"""The ledger: one line for every row that is not used. Nothing vanishes unseen."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ivl_lightning.structures import Record, Reject, RowError, RowKey

_log = logging.getLogger(__name__)


class TooManyRejectsError(ValueError):
    """The share of rejected rows passed the limit."""


def reject(record: Record, error: RowError, *, trained: bool = False) -> Reject:
    """The ledger line of a record that raised `error`, while it was measured or when it was to be trained."""
    return Reject(
        record.dataset,
        record.file,
        record.line,
        record.id,
        error.reason,
        error.message,
        trained=trained,
        offset=record.offset,
        digest=record.digest,
    )


class Ledger:
    """Appends rejects to a file; several processes may write to one ledger, a line is one write.

    Args:
        path: the JSON-lines file; None keeps counts only.

    Attributes:
        counts: rows left out by reason, those that broke in earlier attempts of this run included.
        counted: how many of them count against the limit, other ranks' included.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.counted = 0
        self._known: set[Reject] = set()
        self._written = _read_lines(path)
        self._left_out: set[RowKey] = set()
        self.add((line for line in self._written if line.trained), write=False)

    def add(self, rejects: Iterable[Reject], *, write: bool = True) -> int:
        """Count rows not counted yet, and write what the file does not hold yet.

        A row that breaks in every epoch is one row; a resumed run finds the same rejects again.

        Args:
            rejects: rows not used.
            write: false where another rank writes the same rows.

        Returns:
            How many were counted.
        """
        new = [line for line in dict.fromkeys(rejects) if line not in self._known]
        self._known.update(new)
        self.counts.update(line.reason for line in new)
        counted = sum(line.counted for line in new)
        self.counted += counted
        self._left_out.update(line.row for line in new if line.trained)
        unwritten = [line for line in new if line not in self._written]
        self._written.update(unwritten)
        if self.path is not None and write and unwritten:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, unwritten)
        return counted

    def count_elsewhere(self, counted: int) -> None:
        """Count rows that other ranks have left out; their lines are in the file, by their own hand."""
        self.counted += counted

    def leave_out(self, rows: Iterable[RowKey]) -> None:
        """Rows that broke before a checkpoint was saved."""
        self._left_out.update(rows)

    @property
    def known(self) -> tuple[Reject, ...]:
        """Rows left out, as this process knows them."""
        return tuple(self._known)

    @property
    def left_out(self) -> frozenset[RowKey]:
        """Rows that broke in training as this process knows it, and are not tried again."""
        return frozenset(self._left_out)

    def read_others(self) -> None:
        """Learn from the file which rows broke on other ranks; they are counted already."""
        lines = _read_lines(self.path)
        self._written |= lines
        self._known |= {line for line in lines if line.trained}
        self._left_out |= {line.row for line in lines if line.trained}

    def check(self, rows: int, limit: float, examples: Iterable[Reject]) -> None:
        """Stop where more than `limit` of `rows` were rejected.

        Raises:
            TooManyRejectsError: with counts by reason and the first rows.
        """
        if self.counted <= limit * rows:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        shown = [line for line in examples if line.counted][:5]
        lines = "\n".join(f"  {line.file}:{line.line} {line.reason}: {line.message}" for line in shown)
        raise TooManyRejectsError(
            f"{self.counted} of {rows} rows cannot be used ({self.counted / max(rows, 1):.1%}, "
            f"data.reject_limit={limit:.1%}): {reasons}\n{lines}\n"
            f"Mend the rows (all are listed in {self.path}; mended media are found by ivl-index or a new start), "
            "or raise data.reject_limit"
        )


def _append(path: Path, rejects: Iterable[Reject]) -> None:
    # Unbuffered: the operating system appends each line whole, whoever else writes.
    with path.open("ab", buffering=0) as file:
        for line in rejects:
            file.write((json.dumps(asdict(line), ensure_ascii=False) + "\n").encode())


def _read_lines(path: Path | None) -> set[Reject]:
    if path is None or not path.is_file():
        return set()
    lines: set[Reject] = set()
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.add(Reject(**json.loads(text)))
        except (ValueError, TypeError):
            # Half a line: its writer was killed or the disk was full. The row will be found again.
            _log.warning("%s:%d is no whole line and is passed over", path, number)
    return lines
