"""The table of what trains, printed when a stage starts."""

from collections.abc import Iterable

from rich.table import Table

from ivl_lightning.models.freeze import PartSize


def trainable_table(stage: str, parts: Iterable[PartSize]) -> Table:
    """Parameters of each part: all, and those that get gradients."""
    table = Table(title=f"{stage}: what trains")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    for part in parts:
        table.add_row(part.name, f"{part.total:,}", f"{part.trainable:,}" if part.trainable else "frozen")
    return table
