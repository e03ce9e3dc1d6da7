"""The files of an audit. Each is written aside and renamed, so that none is ever there in half."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ivl_lightning.data.quality import RULES
from ivl_lightning.environment import environment, now
from ivl_lightning.reporting.audit.audit import Audit
from ivl_lightning.reporting.audit.flagged import Flagged
from ivl_lightning.reporting.audit.opened import Example
from ivl_lightning.whole_files import whole_file, write_whole

PAGE_NAME, DATA_NAME = "audit.html", "audit.json"


def write_audit(audit: Audit, folder: Path, command: str) -> Path:
    """Write `audit.html` and `audit.json`.

    Args:
        audit: what was found.
        folder: made if missing.
        command: that asked for it.

    Returns:
        The page.

    Raises:
        OSError: a file cannot be written.
    """
    # Imported late: matplotlib takes its time.
    from ivl_lightning.reporting.audit.page import render

    folder.mkdir(parents=True, exist_ok=True)
    versions = {"written": now(), **environment()}
    with whole_file(folder / DATA_NAME) as file:
        file.writelines(as_text({**audit.as_json(), "command": command, "environment": versions}))
    write_whole(folder / PAGE_NAME, render(audit, command, versions))
    return folder / PAGE_NAME


def as_text(content: dict[str, Any]) -> Iterator[str]:
    """JSON piece by piece: of a million findings there is never more than one as text."""
    yield from json.JSONEncoder(ensure_ascii=False, indent=1, default=_plain).iterencode(content)
    yield "\n"


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, Flagged | Example):
        return value.as_json()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def drop_list(flagged: list[Flagged], rules: Collection[str] | None) -> str:
    """An exclusion list for `data.exclude`: a JSON line for each flagged row, by dataset and line.

    Of duplicates the first row is not flagged, so it stays. A row that breaks several rules stands there once.

    Args:
        flagged: rows that break a quality rule.
        rules: those that count; None takes all.
    """
    chosen: dict[tuple[str, int], Flagged] = {}
    for line in sorted(flagged, key=lambda line: (line.dataset, line.line, RULES.index(line.rule))):
        if rules is None or line.rule in rules:
            chosen.setdefault((line.dataset, line.line), line)
    names = ("dataset", "line", "id", "digest", "rule", "message")
    lines = [json.dumps({name: getattr(line, name) for name in names}, ensure_ascii=False) for line in chosen.values()]
    return "".join(f"{line}\n" for line in lines)


def write_drop_list(path: Path, text: str, exclude: Path | None = None) -> None:
    """Write an exclusion list, but never over one that a person may have edited.

    A run takes one list, so the lines of the list it had already come first. That one may be the same file, which then
    grows.

    Args:
        path: of the list.
        text: its new lines.
        exclude: list whose rows were left out of the audit.

    Raises:
        FileExistsError: the file is there and holds something else.
        OSError: it cannot be written.
    """
    known = "" if exclude is None else exclude.read_text(encoding="utf-8")
    if known and not known.endswith("\n"):
        known += "\n"
    grows = exclude is not None and path.exists() and path.samefile(exclude)
    if not grows and path.is_file() and path.read_text(encoding="utf-8") != known + text:
        raise FileExistsError(f"drop={path} is there and would change: look at it, then remove it or give another name")
    write_whole(path, known + text)
