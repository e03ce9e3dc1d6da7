"""Validation scores and packing figures of each stage as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from ivl_lightning.reporting.run_folder import StageFolder
from ivl_lightning.reporting.table import MEAN_SCORE, NONE, number, percent

PACKING_COLUMNS = (
    "stage",
    "tokens filled",
    "tiles filled",
    "ranks idle",
    "loader wait",
    "samples per step",
    "samples per pack",
    "tokens per second",
    "tiles per second",
)
DATASET_COLUMNS = ("stage", "dataset", "tokens", "tiles", "loss")
DATASET_LOSS = "train/loss/"


def score_kinds(stages: Sequence[StageFolder]) -> list[str]:
    """Kinds that any stage was scored on, in the order in which they appear."""
    prefix = f"{MEAN_SCORE}/"
    names = (name for stage in stages for name in (*stage.summary.scores, *stage.metrics.names(prefix)))
    return list(dict.fromkeys(name.removeprefix(prefix) for name in names if name.startswith(prefix)))


def score_rows(stages: Sequence[StageFolder]) -> list[list[str]]:
    """A row per kind, then their mean and the validation loss; a column per stage."""
    kinds = score_kinds(stages)
    rows = [[kind, *(percent(stage.summary.scores.get(f"{MEAN_SCORE}/{kind}")) for stage in stages)] for kind in kinds]
    means = ["mean", *(percent(stage.summary.scores.get(MEAN_SCORE)) for stage in stages)]
    losses = ["validation loss", *(number(stage.summary.scores.get("val/loss")) for stage in stages)]
    return [*rows, means, losses]


def packing_rows(stages: Sequence[StageFolder]) -> list[list[str]]:
    """How full packs were and how fast they passed: one row per stage that logged it."""
    return [_packing_row(stage) for stage in stages if stage.metrics.names("data/")]


def _packing_row(stage: StageFolder) -> list[str]:
    def values(name: str) -> list[float]:
        return [value for _, value in stage.metrics.series(f"data/{name}")]

    def rate(name: str) -> str:
        # The median: a step that waited for a validation is no measure of speed.
        return f"{median(found):,.0f}" if (found := values(name)) else NONE

    def mean(name: str) -> float | None:
        return fmean(found) if (found := values(name)) else None

    shares = [percent(mean(name)) for name in ("fill_tokens", "fill_tiles", "idle", "wait")]
    samples = [number(mean(name)) for name in ("samples", "samples_per_pack")]
    return [stage.name, *shares, *samples, rate("tokens_per_s"), rate("tiles_per_s")]


def dataset_names(stages: Sequence[StageFolder]) -> list[str]:
    """Datasets whose training loss was logged, in the order in which they appear."""
    names = (name for stage in stages for name in stage.metrics.names(DATASET_LOSS))
    return list(dict.fromkeys(name.removeprefix(DATASET_LOSS) for name in names))


def dataset_rows(stages: Sequence[StageFolder]) -> list[list[str]]:
    """What each dataset gave to each stage: tokens, tiles, and its loss over the last tenth of the steps."""
    return [_dataset_row(stage, name) for stage in stages for name in dataset_names([stage])]


def _dataset_row(stage: StageFolder, name: str) -> list[str]:
    losses = [value for _, value in stage.metrics.series(f"{DATASET_LOSS}{name}")]
    counts = []
    for kind in ("tokens", "tiles"):
        series = stage.metrics.series(f"data/{kind}/{name}")
        counts.append(f"{series[-1][1]:,.0f}" if series else NONE)
    return [stage.name, name, *counts, number(fmean(losses[len(losses) * 9 // 10 :]))]
