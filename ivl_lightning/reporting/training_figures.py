"""Plots of what the optimizer did and how fast it went, a panel per stage."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ivl_lightning.reporting.figures import (
    COLORS,
    data_uri,
    legend_beside,
    line,
    logarithmic_if_wide,
    smooth_line,
    stage_panels,
)
from ivl_lightning.reporting.logged_metrics import Metrics, Series
from ivl_lightning.reporting.run_folder import StageFolder

RATES, NORMS = "lr/", "train/grad_norm"
_PARTS = {"llm": (COLORS[0], 3.6), "projector": (COLORS[1], 2.2), "vision": (COLORS[2], 0.9)}
"""Color of a part, and width of its learning rate: parts that learn at one rate are seen through one another."""
_WHOLE = "#4d4d4d"
_FAR_APART = 30.0
_SPEEDS = (
    ("data/tokens_per_s", "tokens per second", 1.0),
    ("speed/tflops", "TFLOP/s of a rank", 1.0),
    ("speed/mfu", "MFU (%)", 100.0),
    ("memory/device_gb", "GPU memory (GB)", 1.0),
    ("memory/host_gb", "host memory (GB)", 1.0),
)


def optimizer_figure(stages: Sequence[StageFolder]) -> str | None:
    """Learning rates and norms of gradients, each part in a color of its own; None where neither was logged."""
    drawn = [
        (prefix, draw)
        for prefix, draw in ((RATES, _draw_rates), (NORMS, _draw_norms))
        if any(stage.metrics.names(prefix) for stage in stages)
    ]
    if not drawn:
        return None
    figure, rows = stage_panels(stages, [1.9] * len(drawn))
    for (_, draw), panels in zip(drawn, rows, strict=True):
        draw(panels, stages)
        legend_beside(panels)
    return data_uri(figure)


def _draw_rates(panels: Sequence[Axes], stages: Sequence[StageFolder]) -> None:
    lines = [distinct_rates(stage.metrics) for stage in stages]
    for axes, rates in zip(panels, lines, strict=True):
        drawn: set[str] = set()
        for part, series in rates:
            color, width = _PARTS[part]
            # Layer-wise decay gives the tower many rates, under one name.
            line(axes, series, color=color, linewidth=width, label=None if part in drawn else part)
            drawn.add(part)
    _rate_axis(panels[0], [series for rates in lines for _, series in rates])


def distinct_rates(metrics: Metrics) -> list[tuple[str, Series]]:
    """Part and learning rate of each group of parameters; a part's groups that learn at one rate are one."""
    found: list[tuple[str, Series]] = []
    for part in _PARTS:
        for name in metrics.names(f"{RATES}{part}"):
            rate = part, metrics.series(name)
            if rate[1] and rate not in found:
                found.append(rate)
    return found


def _draw_norms(panels: Sequence[Axes], stages: Sequence[StageFolder]) -> None:
    values: list[float] = []
    for axes, stage in zip(panels, stages, strict=True):
        for name in stage.metrics.names(NORMS):
            part = name.removeprefix(NORMS).removeprefix("/")
            series = stage.metrics.series(name)
            color = _PARTS[part][0] if part in _PARTS else _WHOLE
            smooth_line(axes, series, color=color, linewidth=1.5, label=part or "all")
            values += [value for _, value in series]
    logarithmic_if_wide(panels[0], values, "norm of gradients")


def _rate_axis(axes: Axes, every: Sequence[Series]) -> None:
    """From 0 where the peaks of the stages are alike; on a logarithmic scale a rate that falls to 0 has no end."""
    peaks = [peak for series in every if (peak := max(value for _, value in series)) > 0]
    if peaks and max(peaks) > _FAR_APART * min(peaks):
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(min(peaks) / 50, 2 * max(peaks))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate", fontsize=9)


def speed_figure(stages: Sequence[StageFolder]) -> str | None:
    """Tokens per second, share of the hardware's peak, and memory, whichever were logged; None without any."""
    drawn = [speed for speed in _SPEEDS if any(stage.metrics.series(speed[0]) for stage in stages)]
    if not drawn:
        return None
    figure, rows = stage_panels(stages, [1.3] * len(drawn))
    for (name, title, factor), panels in zip(drawn, rows, strict=True):
        for stage, axes in zip(stages, panels, strict=True):
            series = [(step, factor * value) for step, value in stage.metrics.series(name)]
            line(axes, series, color=COLORS[0], alpha=0.3, linewidth=0.8)
            smooth_line(axes, series, color=COLORS[0], linewidth=1.6)
        panels[0].set_ylabel(title.replace(" (", "\n(").replace(" per", "\nper"), fontsize=8)
        panels[0].set_ylim(bottom=0)
    return data_uri(figure)
