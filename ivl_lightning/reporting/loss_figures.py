"""Plots of losses, a panel per stage."""

from __future__ import annotations

from collections.abc import Sequence

from ivl_lightning.reporting.figures import (
    COLORS,
    MOST_LINES,
    data_uri,
    legend_beside,
    line,
    logarithmic_if_wide,
    look,
    smooth_line,
    stage_panels,
)
from ivl_lightning.reporting.run_folder import StageFolder
from ivl_lightning.reporting.scores import DATASET_LOSS, dataset_names


def loss_figure(stages: Sequence[StageFolder]) -> str | None:
    """Training and validation loss; None where neither was logged."""
    logged = [stage.metrics.series(name) for stage in stages for name in ("train/loss", "val/loss")]
    values = [value for series in logged for _, value in series]
    if not values:
        return None
    figure, (panels,) = stage_panels(stages, [3.2])
    for stage, axes in zip(stages, panels, strict=True):
        losses = stage.metrics.series("train/loss")
        line(axes, losses, color=COLORS[0], alpha=0.35, linewidth=0.8, label="training")
        smooth_line(axes, losses, color=COLORS[0], linewidth=1.8, label="training, smoothed")
        line(axes, stage.metrics.series("val/loss"), color=COLORS[1], marker="o", label="validation")
    logarithmic_if_wide(panels[0], values, "loss")
    legend_beside(panels)
    return data_uri(figure)


def dataset_loss_figure(stages: Sequence[StageFolder]) -> str | None:
    """Training loss of each dataset, smoothed, of the first `MOST_LINES`; None where none was logged."""
    names = dataset_names(stages)[:MOST_LINES]
    if not names:
        return None
    figure, (panels,) = stage_panels(stages, [max(2.8, 0.2 * len(names) + 0.4)])
    values = []
    for stage, axes in zip(stages, panels, strict=True):
        for index, name in enumerate(names):
            losses = stage.metrics.series(f"{DATASET_LOSS}{name}")
            values += [value for _, value in losses]
            smooth_line(axes, losses, label=name, linewidth=1.2, **{**look(index), "marker": ""})
    logarithmic_if_wide(panels[0], values, "loss")
    legend_beside(panels)
    return data_uri(figure)
