"""What a report says of preference training: rewards, parts of the loss, and where the pairs come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ivl_lightning.reporting.figures import COLORS, data_uri, in_percent, line, plain, smooth_line
from ivl_lightning.reporting.run_folder import StageFolder
from ivl_lightning.reporting.scores import score_series

COUNTS_NAME = "counts.json"
SOURCE_COLUMNS = ("pairs of", "from the model's own answers", "perturbed")
_PARTS = "train/loss_"


def preference_figure(stages: Sequence[StageFolder]) -> str | None:
    """Reward accuracy, rewards and the shift, and the parts of the loss; None where no stage learned from pairs."""
    stage = _last_of_pairs(stages)
    if stage is None:
        return None
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    accuracy, rewards, parts = figure.subplots(1, 3)
    _accuracy(stage, accuracy)
    _rewards(stage, rewards)
    _parts(stage, parts)
    for axes in (accuracy, rewards, parts):
        axes.locator_params(axis="x", nbins=5, integer=True)
        plain(axes)
        axes.legend(fontsize=7, frameon=False)
    figure.supxlabel("optimizer steps of the stage", fontsize=9)
    return data_uri(figure)


def source_rows(stages: Sequence[StageFolder]) -> list[list[str]]:
    """Pairs of training and validation by origin, where the data's folder says so; see `miniature.pairs`."""
    stage = _last_of_pairs(stages)
    if stage is None:
        return []
    file = Path(stage.config.get("data", {}).get("meta", "")).parent / COUNTS_NAME
    if not file.is_file():
        return []
    splits = json.loads(file.read_text(encoding="utf-8"))
    return [_source_row(name, kinds) for name, kinds in splits.items()]


def _source_row(name: str, kinds: dict[str, dict[str, int]]) -> list[str]:
    meaning = {"pairs": "training", "pairs_val": "validation"}.get(name, name)
    return [meaning, *(f"{sum(counts[origin] for counts in kinds.values()):,}" for origin in ("model", "perturbed"))]


def _last_of_pairs(stages: Sequence[StageFolder]) -> StageFolder | None:
    return next((stage for stage in reversed(stages) if stage.metrics.names("train/rewards_chosen")), None)


def _accuracy(stage: StageFolder, axes: Axes) -> None:
    axes.set_title("chosen answer rewarded more (%)", fontsize=9)
    axes.set_ylim(-4, 104)
    smooth_line(axes, in_percent(stage.metrics.series("train/reward_accuracy")), label="training", **_style(0))
    held_back = in_percent(stage.metrics.series("val/reward_accuracy"))
    line(axes, held_back, color=COLORS[1], marker="o", label="held-back pairs")
    answers = in_percent(score_series(stage.metrics))
    line(axes, answers, color="black", marker="s", markersize=4, label="score of answers")


def _rewards(stage: StageFolder, axes: Axes) -> None:
    axes.set_title("rewards", fontsize=9)
    names = ("rewards_chosen", "rewards_rejected", "reward_margin", "shift")
    for index, name in enumerate(names):
        smooth_line(axes, stage.metrics.series(f"train/{name}"), label=name.replace("_", " "), **_style(index))


def _parts(stage: StageFolder, axes: Axes) -> None:
    axes.set_title("parts of the loss, before their weights", fontsize=9)
    for index, name in enumerate(stage.metrics.names(_PARTS)):
        smooth_line(axes, stage.metrics.series(name), label=name.removeprefix(_PARTS), **_style(index))


def _style(color: int) -> dict[str, Any]:
    return {"color": COLORS[color % len(COLORS)], "linewidth": 1.6}
