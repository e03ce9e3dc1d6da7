"""The parity report as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ivl_lightning.conversion.parity import ParityReport


def print_report(report: ParityReport, *, stderr: bool = False) -> None:
    """Show what was compared and what came of it.

    Args:
        report: of a conversion.
        stderr: write there, for one that failed.
    """
    table = Table(title=f"{report.source} -> {report.target}", title_justify="left")
    for column in ("compared", "measured", "allowed", ""):
        table.add_column(column)
    for compared, measured, allowed, passed in _rows(report):
        table.add_row(compared, measured, allowed, "[green]equal[/green]" if passed else "[red]DIFFERS[/red]")
    console = Console(stderr=stderr, highlight=False)
    console.print(table)
    if report.ran is not None:
        console.print(
            "logits and features: largest difference over their standard deviation, in float32; "
            f"source by {report.ran[0]}, target by {report.ran[1]}"
        )
    for note in report.notes:
        console.print(f"note: {note}")


def _rows(report: ParityReport) -> list[tuple[str, str, str, bool]]:
    rows = [(f"{report.tensors:,} tensors, bit for bit", f"{len(report.differing)} differ", "0", not report.differing)]
    for entry in report.logits:
        limit = f"{report.bound:.0e}"
        logits = entry.relative_logits
        rows.append((f"logits, {entry.probe} ({entry.tokens} tokens)", f"{logits:.1e}", limit, logits <= report.bound))
        if entry.image_features is not None:
            passed = entry.image_features <= report.bound
            rows.append(("image features", f"{entry.image_features:.1e}", limit, passed))
    if report.texts:
        count = len(report.other_ids)
        rows.append((f"token ids of {report.texts} texts", f"{count} differ", "0", not count))
    return rows
