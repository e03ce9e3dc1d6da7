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
    "samples per step",
    "tokens per second",
    "tiles per second",
)


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

    fills = [percent(mean("fill_tokens")), percent(mean("fill_tiles"))]
    return [stage.name, *fills, number(mean("samples")), rate("tokens_per_s"), rate("tiles_per_s")]
