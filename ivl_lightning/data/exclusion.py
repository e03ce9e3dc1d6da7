"""Rows a person has decided to leave out: the list that `ivl-audit drop=FILE` writes and the index honors.

One JSON object per line: `dataset`, `line`, `id`, `digest` (the row's bytes, 16 hexadecimal digits), `rule`, `message`.
A row is known by its dataset and digest, so a list stays right when lines move, and a row that was mended comes back.
Where equal rows stand in a dataset several times and k of them are listed, the last k are left out: a list of
duplicates keeps the first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ivl_lightning.data.index import DatasetIndex
from ivl_lightning.data.measuring import digest_number, digest_text
from ivl_lightning.structures import Reject

EXCLUDED = "excluded"

_log = logging.getLogger(__name__)

Exclusions = dict[str, dict[int, list[dict[str, object]]]]
"""Dataset -> digest -> lines of the list."""


def read_exclusions(path: str) -> Exclusions:
    """Read an exclusion list.

    Raises:
        ValueError: the file cannot be read, or a line lacks `dataset` or `digest`; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"data.exclude={path} cannot be read ({error.strerror}): write it with ivl-audit") from error
    exclusions: Exclusions = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            digest = digest_number(entry["digest"])
            exclusions.setdefault(str(entry["dataset"]), {}).setdefault(digest, []).append(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is no line of an exclusion list ({type(error).__name__}: {error}): it needs "
                '"dataset" and "digest"; write the list with ivl-audit drop=FILE'
            ) from error
    return exclusions


def check_exclusions(path: str | None, indexes: Sequence[DatasetIndex]) -> None:
    """Say which lines of a list do nothing.

    Args:
        path: of the list; None for none.
        indexes: of all datasets the list may name, those of validation included, with their excluded rows.

    Raises:
        ValueError: the list names a dataset that is not there.
    """
    if path is None:
        return
    exclusions, names = read_exclusions(path), {index.name for index in indexes}
    if unknown := sorted(set(exclusions) - names):
        raise ValueError(
            f"data.exclude={path} names the datasets {unknown}, but meta.json has {sorted(names)}: "
            "rename them in the list, or write it anew with ivl-audit"
        )
    wanted = sum(len(entries) for listed in exclusions.values() for entries in listed.values())
    found = sum(line.reason == EXCLUDED for index in indexes for line in index.rejects)
    if found < wanted:
        lost = wanted - found
        _log.warning("%d of %d lines of %s match no row: the rows were changed or are gone", lost, wanted, path)


def without_excluded(index: DatasetIndex, exclusions: Exclusions) -> DatasetIndex:
    """The index without its excluded rows, which become rejects that do not count against the limit."""
    listed = exclusions.get(index.name)
    if not listed:
        return index
    digests = index.columns["digest"]
    found: dict[int, list[int]] = {}
    for row in np.flatnonzero(np.isin(digests, np.fromiter(listed, dtype=np.uint64))).tolist():
        found.setdefault(int(digests[row]), []).append(row)
    excluded: dict[int, dict[str, object]] = {}
    for digest, rows in found.items():
        entries = listed[digest][-len(rows) :]
        excluded.update(zip(rows[-len(entries) :], entries, strict=True))
    kept = np.ones(len(index), dtype=bool)
    kept[list(excluded)] = False
    rejects = tuple(_reject(index, row, excluded[row]) for row in sorted(excluded))
    return replace(index.select(kept), rejects=(*index.rejects, *rejects))


def _reject(index: DatasetIndex, row: int, entry: dict[str, object]) -> Reject:
    known = entry.get("id")
    line, offset, digest = (int(index.columns[name][row]) for name in ("line", "offset", "digest"))
    return Reject(
        index.name,
        index.file,
        line,
        None if known is None else str(known),
        EXCLUDED,
        f"on the exclusion list by rule {entry.get('rule')}: {entry.get('message')}",
        counted=False,
        offset=offset,
        digest=digest_text(digest),
    )
