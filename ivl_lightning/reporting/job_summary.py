"""The summary of a multirun or of a sweep: one page, and the same for other programs as JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from ivl_lightning.reporting.job_table import JobRow, JobTable
from ivl_lightning.reporting.pages import render_page
from ivl_lightning.reporting.table import NONE

PAGE_NAME, JSON_NAME, CSV_NAME = "summary.html", "summary.json", "summary.csv"
_TEMPLATE = "summary.html.jinja"
_REPORT = "report.html"


def write_summary(table: JobTable) -> Path:
    """Write summary.html, summary.json and summary.csv into the folder of the jobs; returns the page."""
    table.folder.mkdir(parents=True, exist_ok=True)
    (table.folder / JSON_NAME).write_text(json.dumps(_plain(table), indent=2, ensure_ascii=False), encoding="utf-8")
    _write_csv(table, table.folder / CSV_NAME)
    page = table.folder / PAGE_NAME
    page.write_text(render(table), encoding="utf-8")
    return page


def render(table: JobTable) -> str:
    """The page as text."""
    # Imported late: matplotlib takes its time, and only drawing needs it.
    from ivl_lightning.reporting.job_figure import job_figure

    return render_page(
        _TEMPLATE,
        name=table.folder.resolve().name,
        table=table,
        headline=_headline(table),
        figure=job_figure(table),
        rows=[(row, table.cells(row), _report(table, row)) for row in table.rows],
        missing=NONE,
    )


def _headline(table: JobTable) -> list[tuple[str, str]]:
    finished = sum(row.state == "finished" for row in table.rows)
    failed = sum(row.state == "failed" for row in table.rows)
    counts = [(f"{finished} of {len(table.rows)}", "jobs finished"), *([(f"{failed}", "failed")] if failed else [])]
    best = table.best
    if best is None:
        return counts
    return [(table.score(best), f"best {table.metric}, of job {best.number}"), *counts]


def _report(table: JobTable, row: JobRow) -> str | None:
    """Where the job's report lies, seen from the page; None where it has none."""
    report = row.folder / _REPORT
    return f"{row.folder.name}/{_REPORT}" if report.is_file() and row.folder.parent == table.folder else None


def _plain(table: JobTable) -> dict[str, object]:
    best = table.best
    return {
        "command": table.command,
        "metric": table.metric,
        "goal": table.goal,
        "best": None if best is None else best.number,
        "jobs": [
            {
                "number": row.number,
                "overrides": row.varied,
                "state": row.state,
                "exit_code": row.exit_code,
                "score": row.score,
                "seconds": None if math.isnan(row.seconds) else row.seconds,
                "run_dir": str(row.folder),
                "error": row.error or None,
            }
            for row in table.rows
        ],
    }


def _write_csv(table: JobTable, file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["job", *table.keys, table.metric or "score", "state", "exit_code", "seconds", "run_dir"])
        for row in table.rows:
            varied = [row.varied.get(key, "") for key in table.keys]
            seconds = "" if math.isnan(row.seconds) else row.seconds
            writer.writerow([row.number, *varied, row.score, row.state, row.exit_code, seconds, row.folder])
