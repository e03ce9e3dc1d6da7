"""Validation numbers, datasets and packing of each stage as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import get_args

from ivl_lightning.config.schema import Metric
from ivl_lightning.reporting.logged_metrics import Metrics, Series
from ivl_lightning.reporting.run_folder import StageFolder
from ivl_lightning.reporting.table import MEAN_SCORE, NONE, OLD_MEAN_SCORE, mean_score, number, percent

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
    "MFU",
)
DATASET_COLUMNS = ("stage", "dataset", "tokens", "tiles", "loss")
DATASET_LOSS = "train/loss/"
_METRICS: tuple[str, ...] = get_args(Metric)
_SHARES = frozenset(("val/repeats", "val/cut_off", "val/reward_accuracy"))
_MEANINGS = {
    "val/loss": "validation loss",
    "val/repeats": "answers that repeat themselves",
    "val/cut_off": "answers cut off at the limit",
    "val/answer_tokens": "tokens of an answer",
}


def score_series(metrics: Metrics) -> Series:
    """The mean score over the steps."""
    return metrics.series(MEAN_SCORE) or metrics.series(OLD_MEAN_SCORE)


def score_names(stages: Sequence[StageFolder]) -> list[str]:
    """Logged names of the datasets' scores, `val/METRIC/DATASET`, in the order in which they appear."""
    return [name for name in _validation_names(stages) if _is_score(name) and name.count("/") > 1]


def score_label(name: str, names: Sequence[str]) -> str:
    """The dataset of a logged name, and its metric where there are several."""
    _, metric, dataset = name.split("/", 2)
    several = len({other.split("/", 2)[1] for other in names}) > 1
    return f"{dataset} ({metric.replace('_', ' ')})" if several else dataset


def score_rows(stages: Sequence[StageFolder]) -> list[list[str]]:
    """A row per dataset, a column per stage."""
    names = score_names(stages)
    return [[score_label(name, names), *_cells(name, stages)] for name in names]


def mean_rows(stages: Sequence[StageFolder]) -> list[list[str]]:
    """Means by metric where there are several, and the mean of all datasets."""
    if not score_names(stages):
        return []
    means = [name for name in _validation_names(stages) if _is_score(name) and name.count("/") == 1]
    by_metric = [[f"mean {_plain(name)}", *_cells(name, stages)] for name in means if len(means) > 1]
    return [*by_metric, ["mean", *(percent(mean_score(stage.summary.scores)) for stage in stages)]]


def other_rows(stages: Sequence[StageFolder]) -> list[list[str]]:
    """Every other number of validation: loss, rewards, how long answers are."""
    names = [name for name in _validation_names(stages) if not _is_score(name) and name != MEAN_SCORE]
    return [[_MEANINGS.get(name, _plain(name)), *_cells(name, stages)] for name in names]


def metrics_used(stages: Sequence[StageFolder]) -> str:
    """Names of the metrics, for people."""
    used = dict.fromkeys(name.split("/", 2)[1].replace("_", " ") for name in score_names(stages))
    return ", ".join(used)


def _cells(name: str, stages: Sequence[StageFolder]) -> list[str]:
    show = percent if _is_score(name) or name in _SHARES else number
    return [show(stage.summary.scores.get(name)) for stage in stages]


def _plain(name: str) -> str:
    return name.removeprefix("val/").replace("_", " ")


def _is_score(name: str) -> bool:
    return name.split("/")[1] in _METRICS


def _validation_names(stages: Sequence[StageFolder]) -> list[str]:
    names = (name for stage in stages for name in (*stage.summary.scores, *stage.metrics.names("val/")))
    return list(dict.fromkeys(name for name in names if name.startswith("val/")))


def packing_rows(stages: Sequence[StageFolder]) -> list[list[str]]:
    """How full packs were and how fast they passed: one row per stage that logged it."""
    return [_packing_row(stage) for stage in stages if stage.metrics.names("data/")]


def _packing_row(stage: StageFolder) -> list[str]:
    def values(name: str) -> list[float]:
        return [value for _, value in stage.metrics.series(name)]

    def rate(name: str) -> str:
        # The median: a step that waited for a validation is no measure of speed.
        return f"{median(found):,.0f}" if (found := values(f"data/{name}")) else NONE

    def mean(name: str) -> float | None:
        return fmean(found) if (found := values(f"data/{name}")) else None

    shares = [percent(mean(name)) for name in ("fill_tokens", "fill_tiles", "idle", "wait")]
    samples = [number(mean(name)) for name in ("samples", "samples_per_pack")]
    mfu = values("speed/mfu")
    return [
        stage.name,
        *shares,
        *samples,
        rate("tokens_per_s"),
        rate("tiles_per_s"),
        percent(median(mfu) if mfu else None),
    ]


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
