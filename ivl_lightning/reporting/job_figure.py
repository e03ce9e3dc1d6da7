"""The scores of jobs over what sets them apart: lines over one or two settings, parallel axes over more, else dots."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ivl_lightning.reporting.figures import COLORS, data_uri
from ivl_lightning.reporting.job_table import SHARES, JobRow, JobTable, Value, value_of
from ivl_lightning.reporting.table import number

_WIDTH = 9.0
_LOG_RATIO = 10.0
_MOST_LINES = 8


def job_figure(table: JobTable) -> str | None:
    """The plot as a picture in a data URI; None where no job has a score."""
    figure = draw_jobs(table)
    return None if figure is None else data_uri(figure)


def draw_jobs(table: JobTable) -> Figure | None:
    """The plot; None where no job has a score."""
    rows = [row for row in table.rows if row.score is not None]
    if not rows:
        return None
    varied = {key: [_value(row, key) for row in rows] for key in table.keys}
    keys = [key for key, values in varied.items() if len(set(values)) > 1]
    numeric = sorted((key for key in keys if _are_numbers(varied[key])), key=lambda key: -len(set(varied[key])))
    others = [key for key in keys if key not in numeric[:1]]
    few_lines = len(others) <= 1 and (not others or len(set(varied[others[0]])) <= _MOST_LINES)
    if numeric and few_lines:
        return _lines(table, rows, numeric[0], others[0] if others else None)
    if len(keys) > 1:
        return _parallel(table, rows, {key: varied[key] for key in keys})
    return _dots(table, rows)


def _value(row: JobRow, key: str) -> Value:
    return value_of(row.varied.get(key, ""))


def _are_numbers(values: Sequence[Value]) -> bool:
    return all(isinstance(value, float) for value in values)


def _lines(table: JobTable, rows: Sequence[JobRow], key: str, group: str | None) -> Figure:
    """Score over a number, a line for each value of another setting; jobs of one place are averaged on the line."""
    figure, axes = _figure(4.2)
    groups = list(dict.fromkeys(row.varied.get(group or "", "") for row in rows))
    for color, name in zip(COLORS, groups, strict=False):
        points = sorted((_number(row, key), _score(row)) for row in rows if row.varied.get(group or "", "") == name)
        places = sorted({place for place, _ in points})
        means = [fmean(score for place, score in points if place == here) for here in places]
        axes.plot(places, means, color=color, linewidth=1.5, label=f"{group}={name}")
        axes.plot(*zip(*points, strict=True), "o", color=color, markersize=5)
    if _spans(numbers := [_number(row, key) for row in rows]):
        axes.set_xscale("log")
        ticks = sorted(set(numbers))
        if len(ticks) <= 10:
            axes.set_xticks(ticks, [number(tick, 3) for tick in ticks])
            axes.minorticks_off()
    if (best := table.best) is not None:
        axes.plot(_number(best, key), _score(best), "o", color="black", fillstyle="none", markersize=12, label="best")
    axes.set_xlabel(key)
    _score_axis(axes, table)
    if group is not None:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _number(row: JobRow, key: str) -> float:
    value = _value(row, key)
    assert isinstance(value, float)
    return value


def _score(row: JobRow) -> float:
    assert row.score is not None
    return row.score


def _spans(numbers: Sequence[float]) -> bool:
    """Whether only a logarithmic axis shows the small ones."""
    return min(numbers) > 0 and max(numbers) >= _LOG_RATIO * min(numbers)


def _parallel(table: JobTable, rows: Sequence[JobRow], varied: dict[str, list[Value]]) -> Figure:
    """A vertical axis for each setting and one for the score, a line for each job in the color of its score."""
    figure, axes = _figure(4.6)
    share = 100.0 if table.metric in SHARES else 1.0
    scores: list[Value] = [share * _score(row) for row in rows]
    columns = [*varied.items(), (_score_name(table), scores)]
    heights = np.array([_heights(axes, place, values) for place, (_, values) in enumerate(columns)])
    good = heights[-1] if table.goal == "maximize" else 1.0 - heights[-1]
    # The better, the darker and the further in front.
    for index in np.argsort(good):
        is_best = rows[index] is table.best
        color = mpl.colormaps["viridis_r"](good[index])
        axes.plot(heights[:, index], color=color, linewidth=3.0 if is_best else 1.2, alpha=1.0 if is_best else 0.7)
    axes.set_xticks(range(len(columns)), [name for name, _ in columns], fontsize=9)
    axes.set_xlim(-0.3, len(columns) - 0.4)
    axes.set_yticks([])
    axes.grid(axis="x", color="black", alpha=0.4)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _heights(axes: Axes, place: int, values: Sequence[Value]) -> list[float]:
    """Values between 0 and 1, their labels written beside the axis: numbers by size, texts evenly."""
    distinct = list(dict.fromkeys(values))
    if not _are_numbers(values):
        at = {value: (index + 0.5) / len(distinct) for index, value in enumerate(distinct)}
        labels = {height: str(value) for value, height in at.items()}
    else:
        numbers = [value for value in distinct if isinstance(value, float)]
        scaled = np.log(numbers) if _spans(numbers) else np.array(numbers)
        span = scaled.max() - scaled.min() or 1.0
        at = dict(zip(distinct, ((scaled - scaled.min()) / span).tolist(), strict=True))
        shown = numbers if len(numbers) <= 6 else [min(numbers), max(numbers)]
        labels = {at[value]: number(value, 3) for value in shown}
    for height, label in labels.items():
        axes.annotate(
            label,
            (place, height),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            zorder=3,
        )
    return [at[value] for value in values]


def _dots(table: JobTable, rows: Sequence[JobRow]) -> Figure:
    """A dot for each job, named by what sets it apart."""
    figure, axes = _figure(0.28 * len(rows) + 1.2)
    names = [" ".join((f"{row.number}:", *row.varied.values())) for row in rows]
    for place, row in enumerate(rows):
        axes.plot(_score(row), place, "o", color="black" if row is table.best else COLORS[0])
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _score_axis(axes, table, "x")
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return figure, axes


def _score_axis(axes: Axes, table: JobTable, which: str = "y") -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_label_text(_score_name(table))
    if table.metric in SHARES:
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))


def _score_name(table: JobTable) -> str:
    assert table.metric is not None, "there are scores without a metric"
    return f"{table.metric} (%)" if table.metric in SHARES else table.metric
