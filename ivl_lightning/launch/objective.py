"""The score of a run: the one number by which jobs of a multirun or of a sweep are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import ObjectiveConfig, RunConfig
from ivl_lightning.launch.finished import read_finished

Goal = Literal["maximize", "minimize"]
METRICS = ("val/score", "val/exact_match", "val/reward_accuracy", "val/loss")
"""What is compared where `objective.metric` does not say it: the first that there is."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What is compared, and which way.

    Attributes:
        metric: logged name.
        goal: whether more or less of it is better.
    """

    metric: str
    goal: Goal

    def of(self, scores: Mapping[str, float]) -> float | None:
        """The score among these metrics; None where it is not there or no number."""
        value = scores.get(self.metric, math.nan)
        return value if math.isfinite(value) else None


def choose_objective(settings: ObjectiveConfig, runs: Iterable[Mapping[str, float]]) -> Objective | None:
    """One objective for all runs; None where none of them has logged what it could be.

    Args:
        settings: of the command.
        runs: metric -> value, of each run.
    """
    known = {name for scores in runs for name in scores}
    metric = settings.metric or next((name for name in METRICS if name in known), None)
    if metric is None:
        return None
    return Objective(metric, settings.goal or ("minimize" if metric.endswith("loss") else "maximize"))


def objective_stage(configs: Mapping[str, RunConfig]) -> str:
    """The stage whose scores count.

    Args:
        configs: stage name -> its configuration, in order.

    Raises:
        ConfigError: `objective.stage` is not among them.
    """
    names = list(configs)
    stage = configs[names[-1]].objective.stage or names[-1]
    if stage not in configs:
        raise ConfigError(f"objective.stage={stage} is not among the stages of the run: {', '.join(names)}")
    return stage


def read_scores(configs: Mapping[str, RunConfig]) -> dict[str, float]:
    """Last validation metrics of the stage that counts; empty where it is not finished.

    Args:
        configs: stage name -> its configuration, in order.
    """
    stage = objective_stage(configs)
    finished = read_finished(Path(configs[stage].run_dir) / stage)
    return {} if finished is None else finished.scores
