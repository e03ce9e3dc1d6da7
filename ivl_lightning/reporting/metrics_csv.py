"""The metrics a stage logged: the CSV files of all its attempts, merged by step."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

Series = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Logged values by step.

    Attributes:
        by_step: step -> metric -> value, in the order of steps; a step holds only what was logged there.
    """

    by_step: dict[int, dict[str, float]]

    @property
    def last_step(self) -> int:
        """The last logged step; 0 where nothing was logged."""
        return max(self.by_step, default=0)

    def series(self, name: str) -> Series:
        """Steps and finite values of one metric."""
        return [(step, row[name]) for step, row in self.by_step.items() if math.isfinite(row.get(name, math.nan))]

    def names(self, prefix: str) -> list[str]:
        """Metrics whose names begin so, in the order in which they first appear."""
        found = (name for row in self.by_step.values() for name in row if name.startswith(prefix))
        return list(dict.fromkeys(found))

    def last(self, prefix: str) -> dict[str, float]:
        """The last value of each metric whose name begins so."""
        return {name: series[-1][1] for name in self.names(prefix) if (series := self.series(name))}


def read_metrics(folder: Path) -> Metrics:
    """Merge `metrics.csv` of all `version_*` folders; where two hold the same step the later version wins.

    Args:
        folder: of the CSV logger; it need not exist.
    """
    by_step: dict[int, dict[str, float]] = {}
    for file in sorted(folder.glob("version_*/metrics.csv"), key=_version):
        for row in csv.DictReader(complete_lines(file)):
            values = {name: float(text) for name, text in row.items() if text}
            by_step.setdefault(int(values.pop("step")), {}).update(values)
    return Metrics(dict(sorted(by_step.items())))


def complete_lines(file: Path) -> list[str]:
    """The lines of a file that grows; the last one is left out if a killed process did not finish it."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return [line for line in stream if line.endswith("\n")]


def thinned(series: Series, limit: int) -> Series:
    """At most `limit` points: means of neighbors, so that the picture of a long run stays small."""
    size = math.ceil(len(series) / limit)
    groups = (series[start : start + size] for start in range(0, len(series), max(size, 1)))
    return [(group[-1][0], fmean(_values(group))) for group in groups]


def smoothed(series: Series, window: int) -> Series:
    """Each value replaced by the mean over the last `window` values."""
    values = _values(series)
    return [(step, fmean(values[max(0, index + 1 - window) : index + 1])) for index, (step, _) in enumerate(series)]


def _values(series: Iterable[tuple[int, float]]) -> list[float]:
    return [value for _, value in series]


def _version(file: Path) -> int:
    # By number: as text version_10 would come before version_2.
    number = re.fullmatch(r"version_(\d+)", file.parent.name)
    return int(number[1]) if number else -1
