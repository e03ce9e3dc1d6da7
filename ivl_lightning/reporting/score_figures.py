"""Plots of scores: over the steps of each stage, and over the tile limit."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ivl_lightning.reporting.figures import (
    MOST_LINES,
    data_uri,
    in_percent,
    legend_beside,
    line,
    look,
    plain,
    stage_panels,
)
from ivl_lightning.reporting.run_folder import StageFolder
from ivl_lightning.reporting.scores import score_label, score_names, score_series


def score_figure(stages: Sequence[StageFolder]) -> str | None:
    """The score of each dataset by its metric, of the first `MOST_LINES`, and their mean; None without any."""
    if not any(score_series(stage.metrics) for stage in stages):
        return None
    every = score_names(stages)
    names = every[:MOST_LINES]
    figure, (panels,) = stage_panels(stages, [max(3.2, 0.2 * len(names) + 0.6)])
    for stage, axes in zip(stages, panels, strict=True):
        for index, name in enumerate(names):
            points = in_percent(stage.metrics.series(name))
            line(axes, points, label=score_label(name, every), markersize=4, linewidth=1.2, **look(index))
        mean = in_percent(score_series(stage.metrics))
        line(axes, mean, color="black", marker="o", markersize=5, linewidth=2.6, label="mean")
    panels[0].set_ylim(-4, 104)
    panels[0].set_ylabel("score (%)", fontsize=9)
    legend_beside(panels)
    return data_uri(figure)


def tile_figure(stages: Sequence[StageFolder]) -> str | None:
    """Score, and tokens of a prompt, over the tile limit, a line per stage; None where no stage was asked for it."""
    traced = [stage for stage in stages if stage.tile_curve]
    if not traced:
        return None
    figure = Figure(figsize=(11.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, stage in enumerate(traced):
        limits = [point["max_tiles"] for point in stage.tile_curve]
        style = {**look(index), "label": stage.name.replace("_", " "), "markersize": 5}
        left.plot(limits, [100 * point["score"] for point in stage.tile_curve], **style)
        right.plot(limits, [point["prompt_tokens"] for point in stage.tile_curve], **style)
    left.set_ylabel("score (%)", fontsize=9)
    right.set_ylabel("tokens of a prompt, mean", fontsize=9)
    points = [point for stage in traced for point in stage.tile_curve]
    left.set_ylim(0, min(110 * max(point["score"] for point in points) + 1, 104))
    right.set_ylim(0, 1.1 * max(point["prompt_tokens"] for point in points))
    for axes in (left, right):
        axes.set_xlabel("tile limit of a picture", fontsize=9)
        axes.set_xticks(sorted({point["max_tiles"] for point in points}))
        plain(axes)
    legend_beside([right])
    return data_uri(figure)
