"""The metrics a stage logged: its metrics file, in which all its attempts write, merged by step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from ivl_lightning.constants import METRICS_NAME

Series = list[tuple[int, float]]


@dataclass(frozen=True)
class Metrics:
    """Logged values by step.

    Attributes:
        by_step: finished optimizer steps -> metric -> value, in their order; a step holds only what was logged there.
    """

    by_step: dict[int, dict[str, float]]

    @property
    def last_step(self) -> int:
        """The last logged step; 0 where nothing was logged."""
        return max(self.by_step, default=0)

    def series(self, name: str) -> Series:
        """Steps and finite values of one metric."""
        return self._by_name.get(name, [])

    def names(self, prefix: str) -> list[str]:
        """Metrics whose names begin so, in the order in which they first appear."""
        return [name for name in self._by_name if name.startswith(prefix)]

    def last(self, prefix: str) -> dict[str, float]:
        """The last value of each metric whose name begins so."""
        return {name: series[-1][1] for name in self.names(prefix) if (series := self.series(name))}

    @cached_property
    def _by_name(self) -> dict[str, Series]:
        found: dict[str, Series] = {}
        for step, row in self.by_step.items():
            for name, value in row.items():
                series = found.setdefault(name, [])
                if math.isfinite(value):
                    series.append((step, value))
        return found


def read_metrics(folder: Path) -> Metrics:
    """The metrics of all attempts; a later line about the same metric of the same step wins.

    Lines without a step, as somebody's own code may log them, are passed over.

    Args:
        folder: of the stage; it need not exist.
    """
    by_step: dict[int, dict[str, float]] = {}
    for line in complete_lines(folder / METRICS_NAME):
        values = json.loads(line)
        if (step := values.pop("step")) is not None:
            row = {name: math.nan if value is None else value for name, value in values.items()}
            by_step.setdefault(step, {}).update(row)
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
    sums = [0.0, *accumulate(_values(series))]
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [
        (step, (sums[end] - sums[start]) / (end - start))
        for end, (start, (step, _)) in enumerate(zip(starts, series, strict=True), 1)
    ]


def _values(series: Iterable[tuple[int, float]]) -> list[float]:
    return [value for _, value in series]
