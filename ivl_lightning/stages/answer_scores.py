"""Scores of a set of answers: each dataset by its own metric, their means, and how long answers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ivl_lightning.config.schema import Metric
from ivl_lightning.data.quality import repeats_itself
from ivl_lightning.metrics.answer_score import AnswerScore
from ivl_lightning.metrics.scoring import METRICS
from ivl_lightning.structures import Answer

Number = Literal["repeats", "cut_off", "answer_tokens", "prompt_tokens", "tiles"]
SCORE = "score"

_NUMBERS: Mapping[Number, Callable[[Answer], float]] = {
    "repeats": lambda answer: repeats_itself(answer.generated),
    "cut_off": lambda answer: answer.cut_off,
    "answer_tokens": lambda answer: answer.tokens,
    "prompt_tokens": lambda answer: answer.prompt_tokens,
    "tiles": lambda answer: answer.tiles,
}


class AnswerScores(nn.Module):
    """Adds up what answers score, on every rank alike.

    Args:
        numbers: which means over all answers are taken besides scores: share that repeats itself, share that ran to the
            limit of tokens, tokens of an answer, of its prompt, and tiles.
    """

    def __init__(self, numbers: Sequence[Number] = ("repeats", "cut_off", "answer_tokens")) -> None:
        super().__init__()
        self._metrics: dict[str, Metric] = {}
        # In a list: a dataset's name may hold a point, a module's may not.
        self._scores = nn.ModuleList()
        self._numbers = nn.ModuleDict({name: MeanMetric() for name in numbers})

    def add(self, dataset: str, metric: Metric) -> None:
        """Score the answers of a dataset, unless that was said before; every rank must add the same, in one order."""
        if dataset not in self._metrics:
            self._metrics[dataset] = metric
            self._scores.append(METRICS[metric]())

    def reset(self) -> None:
        """Count anew."""
        for metric in (*self._by_dataset().values(), *self._means().values()):
            metric.reset()

    def update(self, answers: Sequence[Answer]) -> None:
        """Count answers of datasets that were added; perhaps none, on a rank that only keeps step."""
        assert {answer.record.dataset for answer in answers} <= self._metrics.keys()
        # A dataset without an answer here is told so: else torchmetrics takes it for forgotten, and warns.
        for dataset, metric in self._by_dataset().items():
            own = [answer for answer in answers if answer.record.dataset == dataset]
            metric.update(
                [answer.generated for answer in own],
                [answer.truths for answer in own],
                [answer.question for answer in own],
            )
        for name, mean in self._means().items():
            mean.update(torch.tensor([float(_NUMBERS[name](answer)) for answer in answers]))

    def compute(self) -> dict[str, Tensor]:
        """Scalars of all ranks by name; every rank must call it.

        Returns:
            `METRIC/DATASET` of each dataset, `METRIC` as the mean over datasets with that metric, `score` as the mean
            over all datasets, and the means over answers. Empty without a dataset.
        """
        if not self._metrics:
            return {}
        scores = {dataset: metric.compute() for dataset, metric in self._by_dataset().items()}
        named = {f"{self._metrics[dataset]}/{dataset}": score for dataset, score in scores.items()}
        groups: dict[str, list[Tensor]] = {}
        for dataset, score in scores.items():
            groups.setdefault(self._metrics[dataset], []).append(score)
        means = {metric: torch.stack(group).mean() for metric, group in groups.items()}
        numbers: dict[str, Tensor] = {name: mean.compute() for name, mean in self._means().items()}
        return {**named, **means, SCORE: torch.stack(list(scores.values())).mean(), **numbers}

    def _by_dataset(self) -> dict[str, AnswerScore]:
        return dict(zip(self._metrics, cast(list[AnswerScore], list(self._scores)), strict=True))

    def _means(self) -> dict[Number, MeanMetric]:
        return cast(dict[Number, MeanMetric], dict(self._numbers.items()))
