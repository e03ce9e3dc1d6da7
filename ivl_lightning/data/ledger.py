"""The ledger: one line for every row that is not used. Nothing vanishes unseen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ivl_lightning.structures import Record, Reject, RowError


class TooManyRejectsError(ValueError):
    """The share of rejected rows passed the limit."""


def reject(record: Record, error: RowError, *, counted: bool = True) -> Reject:
    """The ledger line of a record that raised `error`."""
    return Reject(record.dataset, record.file, record.line, record.id, error.reason, error.message, counted)


class Ledger:
    """Appends rejects to a file; several processes may write to one ledger, a line is one write.

    Args:
        path: the JSON-lines file; None keeps counts only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.counted = 0
        self._known: set[Reject] = set()
        self._written = _read_lines(path)
        self._broken: set[tuple[str, int]] = set()

    def add(self, rejects: Iterable[Reject], *, write: bool = True) -> None:
        """Count rows not counted yet, and write what the file does not hold yet.

        A row that breaks in every epoch is one row; a resumed run finds the same rejects again.

        Args:
            rejects: rows not used.
            write: false where another rank writes the same rows.
        """
        rejects = [line for line in dict.fromkeys(rejects) if line not in self._known]
        self._known.update(rejects)
        self.counts.update(line.reason for line in rejects)
        self.counted += sum(line.counted for line in rejects)
        rejects = [line for line in rejects if line not in self._written]
        self._written.update(rejects)
        if self.path is None or not write or not rejects:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for line in rejects:
                file.write(json.dumps(asdict(line), ensure_ascii=False) + "\n")

    @property
    def broken_rows(self) -> set[tuple[str, int]]:
        """Dataset and line of the rows that broke in training, as this process knows them."""
        return set(self._broken)

    def leave_out(self, rows: Iterable[tuple[str, int]]) -> None:
        """Note rows that broke in training, in this process or before a checkpoint was saved."""
        self._broken.update(rows)

    def rows(self) -> frozenset[tuple[str, int]]:
        """Dataset and line of all rows known to be broken, those that other ranks have written included."""
        self._written |= _read_lines(self.path)
        return frozenset(self._broken | {(line.dataset, line.line) for line in self._written})

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
            f"Mend the rows (all are listed in {self.path}), or raise data.reject_limit"
        )


def _read_lines(path: Path | None) -> set[Reject]:
    if path is None or not path.is_file():
        return set()
    with path.open(encoding="utf-8") as file:
        return {Reject(**json.loads(line)) for line in file}
