"""What plots of a chain share: a panel per stage, lines, legends, and an SVG picture in a data URI in the end."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ivl_lightning.reporting.logged_metrics import Series, smoothed, thinned
from ivl_lightning.reporting.run_folder import StageFolder

COLORS = mpl.color_sequences["tab10"]
MOST_LINES = 20
"""Lines of one plot: more are neither told apart nor small."""
_POINTS = 600
_WIDTH = 11.0
_SMALLEST_SHARE = 0.14
_LOG_RATIO = 30.0
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def stage_panels(stages: Sequence[StageFolder], heights: Sequence[float]) -> tuple[Figure, list[list[Axes]]]:
    """A row of panels for each height in inches, and in it a panel per stage, as wide as the stage is long.

    Panels of a row share their vertical axis, panels of a stage their steps.

    Args:
        stages: one at least.
        heights: of the rows, without titles.
    """
    lengths = [max(stage.summary.steps, stage.metrics.last_step, 1) for stage in stages]
    # A stage of a few steps beside one of many thousands still gets a panel one can read.
    widths = [max(length / sum(lengths), _SMALLEST_SHARE) for length in lengths]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.8), layout="constrained")
    grid = figure.subplots(
        len(heights),
        len(stages),
        sharex="col",
        sharey="row",
        squeeze=False,
        width_ratios=widths,
        height_ratios=heights,
    )
    for stage, axes in zip(stages, grid[0], strict=True):
        name = stage.name.replace("_", " ")
        axes.set_title(name if stage.finished else f"{name}\n(not finished)", fontsize=9)
    for length, column in zip(lengths, grid.T, strict=True):
        for axes in column:
            axes.set_xlim(-0.03 * length, 1.04 * length)
            axes.locator_params(axis="x", nbins=4, integer=True)
            plain(axes)
    figure.supxlabel("optimizer steps of the stage", fontsize=9)
    return figure, [list(row) for row in grid]


def plain(axes: Axes) -> None:
    """A light grid, small numbers, and no frame above and on the right."""
    axes.tick_params(labelsize=8, length=3)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def line(axes: Axes, series: Series, **style: Any) -> None:
    """Draw a series, thinned where it is long."""
    points = thinned(series, _POINTS)
    axes.plot([step for step, _ in points], [value for _, value in points], **style)


def smooth_line(axes: Axes, series: Series, **style: Any) -> None:
    """Draw the running mean over a thirtieth of a series."""
    line(axes, smoothed(series, max(len(series) // 30, 1)), **style)


def look(index: int) -> dict[str, Any]:
    """Color, dashes and marker of the line of this number."""
    round_of_colors = index // len(COLORS) % len(_STYLES)
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": _STYLES[round_of_colors],
        "marker": _MARKERS[round_of_colors],
    }


def in_percent(series: Series) -> Series:
    """Shares as percentages."""
    return [(step, 100 * value) for step, value in series]


def logarithmic_if_wide(axes: Axes, values: Sequence[float], name: str) -> None:
    """Name the vertical axis; a logarithmic one where values are positive and far apart."""
    wide = bool(values) and min(values) > 0 and max(values) > _LOG_RATIO * min(values)
    axes.set_ylabel(f"{name} (log scale)" if wide else name, fontsize=9)
    if wide:
        axes.set_yscale("log")
        # Matplotlib labels powers of ten only, too few for a loss that falls from 5 to 0.1.
        within_decades = max(values) < 1e3 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if within_decades else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def legend_beside(axes: Sequence[Axes]) -> None:
    """What the lines of a row of panels are, on the right of the last one; each name once."""
    named = {}
    for one in axes:
        named.update(dict(zip(*reversed(one.get_legend_handles_labels()), strict=True)))
    if named:
        axes[-1].legend(
            named.values(), named.keys(), loc="upper left", bbox_to_anchor=(1.02, 1.02), fontsize=8, frameon=False
        )


def data_uri(figure: Figure) -> str:
    """Draw on the page's own ground; without a date and with fixed ids, so that the same run gives the same file."""
    drawing = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None}, transparent=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing.getvalue()).decode()}"
