"""Plots of the whole chain, a panel per stage, as SVG pictures in data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ivl_lightning.reporting.metrics_csv import Series, smoothed, thinned
from ivl_lightning.reporting.run_folder import StageFolder
from ivl_lightning.reporting.scores import DATASET_LOSS, dataset_names, score_kinds
from ivl_lightning.reporting.table import MEAN_SCORE

_POINTS = 600
_WIDTH = 11.0
_SMALLEST_SHARE = 0.14
_LOG_RATIO = 30.0
_COLORS = mpl.color_sequences["tab10"]
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def loss_figure(stages: Sequence[StageFolder]) -> str | None:
    """Training and validation loss; None where neither was logged."""
    logged = [stage.metrics.series(name) for stage in stages for name in ("train/loss", "val/loss")]
    values = [value for series in logged for _, value in series]
    if not values:
        return None
    figure, panels = _panels(stages, height=3.8)
    for stage, axes in zip(stages, panels, strict=True):
        losses = stage.metrics.series("train/loss")
        line(axes, losses, color=_COLORS[0], alpha=0.35, linewidth=0.8, label="training")
        smooth = smoothed(losses, max(len(losses) // 30, 1))
        line(axes, smooth, color=_COLORS[0], linewidth=1.8, label="training, smoothed")
        line(axes, stage.metrics.series("val/loss"), color=_COLORS[1], marker="o", label="validation")
    panels[0].set_ylabel("loss")
    if min(values) > 0 and max(values) > _LOG_RATIO * min(values):
        _logarithmic(panels[0])
    return _with_legend(figure, panels)


def dataset_loss_figure(stages: Sequence[StageFolder]) -> str | None:
    """Training loss of each dataset, smoothed; None where none was logged."""
    names = dataset_names(stages)
    if not names:
        return None
    figure, panels = _panels(stages, height=max(3.4, 0.22 * len(names) + 1.0))
    for stage, axes in zip(stages, panels, strict=True):
        for index, name in enumerate(names):
            losses = stage.metrics.series(f"{DATASET_LOSS}{name}")
            look = {**_look(index), "marker": ""}
            line(axes, smoothed(losses, max(len(losses) // 30, 1)), label=name, linewidth=1.2, **look)
    panels[0].set_ylabel("loss")
    return _with_legend(figure, panels)


def score_figure(stages: Sequence[StageFolder]) -> str | None:
    """Exact match of each kind and their mean, in percent; None where nothing was logged."""
    if not any(stage.metrics.names(MEAN_SCORE) for stage in stages):
        return None
    kinds = score_kinds(stages)
    figure, panels = _panels(stages, height=max(3.8, 0.22 * len(kinds) + 1.0))
    for stage, axes in zip(stages, panels, strict=True):
        for index, kind in enumerate(kinds):
            points = _percent(stage.metrics.series(f"{MEAN_SCORE}/{kind}"))
            line(axes, points, label=kind, markersize=4, linewidth=1.2, **_look(index))
        mean = _percent(stage.metrics.series(MEAN_SCORE))
        line(axes, mean, color="black", marker="o", markersize=5, linewidth=2.6, label="mean")
    panels[0].set_ylim(-4, 104)
    panels[0].set_ylabel("exact match (%)")
    return _with_legend(figure, panels)


def _panels(stages: Sequence[StageFolder], height: float) -> tuple[Figure, list[Axes]]:
    """One panel per stage, side by side on one vertical axis, as wide as the stage is long."""
    lengths = [max(stage.summary.steps, stage.metrics.last_step, 1) for stage in stages]
    # A stage of a few steps beside one of many thousands still gets a panel one can read.
    widths = [max(length / sum(lengths), _SMALLEST_SHARE) for length in lengths]
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = figure.subplots(1, len(stages), sharey=True, squeeze=False, width_ratios=widths)
    panels = list(grid[0])
    for stage, length, axes in zip(stages, lengths, panels, strict=True):
        name = stage.name.replace("_", " ")
        axes.set_title(name if stage.finished else f"{name}\n(not finished)", fontsize=9)
        axes.set_xlim(-0.02 * length, 1.03 * length)
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.supxlabel("optimizer steps of the stage", fontsize=9)
    return figure, panels


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_ylabel("loss (log scale)")
    # Matplotlib labels powers of ten only, too few for a loss that falls from 5 to 0.1.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def line(axes: Axes, series: Series, **style: Any) -> None:
    """Draw a series, thinned where it is long."""
    points = thinned(series, _POINTS)
    axes.plot([step for step, _ in points], [value for _, value in points], **style)


def _look(index: int) -> dict[str, Any]:
    round_of_colors = index // len(_COLORS) % len(_STYLES)
    return {
        "color": _COLORS[index % len(_COLORS)],
        "linestyle": _STYLES[round_of_colors],
        "marker": _MARKERS[round_of_colors],
    }


def _percent(series: Series) -> Series:
    return [(step, 100 * value) for step, value in series]


def _with_legend(figure: Figure, panels: Sequence[Axes]) -> str:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return data_uri(figure)


def data_uri(figure: Figure) -> str:
    """Draw; without a date and with fixed ids, so that the same run gives the same file."""
    drawing = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing.getvalue()).decode()}"
