"""What a report says of preference training: rewards, parts of the loss, and where the pairs come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ivl_lightning.reporting.figures import data_uri, line
from ivl_lightning.reporting.metrics_csv import Series, smoothed
from ivl_lightning.reporting.run_folder import StageFolder

COUNTS_NAME = "counts.json"
SOURCE_COLUMNS = ("pairs of", "from the model's own answers", "perturbed")
_COLORS = mpl.color_sequences["tab10"]
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
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.grid(alpha=0.3)
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
    _curve(axes, _percent(stage.metrics.series("train/reward_accuracy")), 0, "training")
    held_back = _percent(stage.metrics.series("val/reward_accuracy"))
    line(axes, held_back, color=_COLORS[1], marker="o", label="held-back pairs")
    answers = _percent(stage.metrics.series("val/exact_match"))
    line(axes, answers, color="black", marker="s", markersize=4, label="exact match of answers")


def _rewards(stage: StageFolder, axes: Axes) -> None:
    axes.set_title("rewards", fontsize=9)
    names = ("rewards_chosen", "rewards_rejected", "reward_margin", "shift")
    for index, name in enumerate(names):
        _curve(axes, stage.metrics.series(f"train/{name}"), index, name.replace("_", " "))


def _parts(stage: StageFolder, axes: Axes) -> None:
    axes.set_title("parts of the loss, before their weights", fontsize=9)
    for index, name in enumerate(stage.metrics.names(_PARTS)):
        _curve(axes, stage.metrics.series(name), index, name.removeprefix(_PARTS))


def _curve(axes: Axes, series: Series, color: int, label: str) -> None:
    line(axes, smoothed(series, max(len(series) // 30, 1)), color=_COLORS[color], linewidth=1.6, label=label)


def _percent(series: Series) -> Series:
    return [(step, 100 * value) for step, value in series]
