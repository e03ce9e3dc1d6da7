"""The files of an audit. Each is written aside and renamed, so that none is ever there in half."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from ivl_lightning.data.quality import RULES
from ivl_lightning.reporting.audit.audit import Audit
from ivl_lightning.reporting.audit.findings import Flagged

PAGE_NAME, DATA_NAME = "audit.html", "audit.json"


def write_audit(audit: Audit, folder: Path, command: str) -> Path:
    """Write `audit.html` and `audit.json`.

    Args:
        audit: what was found.
        folder: made if missing.
        command: that asked for it.

    Returns:
        The page.
    """
    # Imported late: matplotlib takes its time.
    from ivl_lightning.reporting.audit.page import render

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DATA_NAME, json.dumps(audit.as_json(), ensure_ascii=False, indent=1) + "\n")
    write_whole(folder / PAGE_NAME, render(audit, command))
    return folder / PAGE_NAME


def write_whole(path: Path, text: str) -> None:
    """Write a text file at once: whoever looks sees the old one or the new one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


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


def write_drop_list(path: Path, text: str) -> None:
    """Write an exclusion list, but never over one that a person may have edited.

    Raises:
        FileExistsError: the file is there and holds something else.
    """
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(f"drop={path} is there and would change: look at it, then remove it or give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
