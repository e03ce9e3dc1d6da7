"""Whether the training data are those that a recipe's numbers belong to: names of datasets and their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ivl_lightning.data.index import DatasetIndex


def check_expected_rows(expected: Mapping[str, int] | None, indexes: Sequence[DatasetIndex]) -> None:
    """Compare the datasets with `data.expected_rows`.

    Args:
        expected: dataset -> rows; None for no such rule.
        indexes: of the training data. Rows that are rejected or excluded count too.

    Raises:
        ValueError: a dataset is missing, is one too many, or has another number of rows; names each of them.
    """
    if expected is None:
        return
    found = {index.name: len(index) + len(index.rejects) for index in indexes}
    faults = [f"{name} is missing, {rows:,} rows expected" for name, rows in expected.items() if name not in found]
    faults += [f"{name} is not expected, it has {rows:,} rows" for name, rows in found.items() if name not in expected]
    faults += [
        f"{name} has {found[name]:,} rows, {rows:,} expected"
        for name, rows in expected.items()
        if found.get(name, rows) != rows
    ]
    if faults:
        raise ValueError(
            f"data.meta is not what data.expected_rows says: {'; '.join(faults)}. Correct meta.json or annotations, or "
            "set data.expected_rows=null to train on other data"
        )
