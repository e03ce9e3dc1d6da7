"""Histograms of a dataset as one SVG picture in a data URI."""

from __future__ import annotations

import base64
import io
from itertools import pairwise

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ivl_lightning.reporting.audit.findings import DatasetFacts, Spread

_COLORS = {"tokens": "#2f6db3", "tiles": "#b3672f", "labels": "#3c8a57"}
_NARROWEST = 8
"""Whole numbers that a panel shows at least."""
_TITLES = {"tokens": "tokens of a row", "tiles": "tiles of a row", "labels": "trained tokens of a row"}


def histogram_figure(facts: DatasetFacts) -> str | None:
    """Tokens, tiles and labels side by side; None without a usable row."""
    if not facts.spreads:
        return None
    figure = Figure(figsize=(11.0, 2.5), layout="constrained")
    panels = figure.subplots(1, len(facts.spreads), squeeze=False)[0]
    for (name, values), axes in zip(facts.spreads.items(), panels, strict=True):
        _draw(axes, values, _COLORS[name])
        axes.set_title(_TITLES[name], fontsize=10)
    panels[0].set_ylabel("rows", fontsize=9)
    return _data_uri(figure)


def _draw(axes: Axes, values: Spread, color: str) -> None:
    histogram = values.histogram
    widths = [stop - start for start, stop in pairwise(histogram.edges)]
    axes.bar(
        histogram.edges[:-1], histogram.counts, widths, align="edge", color=color, edgecolor="white", linewidth=0.4
    )
    axes.axvline(values.median, color="#444444", linestyle="--", linewidth=1)
    axes.text(0.98, 0.95, f"median {values.median:,.0f}", transform=axes.transAxes, ha="right", va="top", fontsize=8)
    if histogram.edges[-1] - histogram.edges[0] < _NARROWEST:
        # One bar would fill the panel, and the ticks would repeat its number.
        center = (histogram.edges[-1] + histogram.edges[0]) / 2
        axes.set_xlim(center - _NARROWEST / 2, center + _NARROWEST / 2)
    if histogram.log:
        axes.set_xscale("log")
        # Matplotlib labels powers of ten only, too few for a column from 200 to 9,000.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    # Room above the bars for the median's number.
    axes.set_ylim(0, 1.25 * max(histogram.counts))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _data_uri(figure: Figure) -> str:
    """Draw without a date and with fixed ids, so that the same data give the same file."""
    drawing = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "audit"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing.getvalue()).decode()}"
