"""A run of a search as a job, and what it has reached so far."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ivl_lightning.launch.agent_arguments import settings
from ivl_lightning.launch.objective import objective_stage
from ivl_lightning.launch.overrides import literal
from ivl_lightning.launch.planned_jobs import PlannedJob, plan_jobs
from ivl_lightning.launch.sweep_file import SweepFile
from ivl_lightning.launch.sweep_state import SweepRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is to be done.

    Attributes:
        file: of the sweep.
        overrides: of every run.
        run_dir: of the search; run N lies in `run_dir/N`.
        seed: of the suggestions.
        count: most runs; None for all points of a grid.
        read: gives the finite values of a metric that a stage's folder holds so far, in the order of steps.
        has_wandb: whether runs are logged for W&B, and so need names that tell them apart.
    """

    file: SweepFile
    overrides: tuple[str, ...]
    run_dir: str
    seed: int
    count: int | None
    read: Callable[[Path, str], Sequence[float]]
    has_wandb: bool = False

    def plan(self, run: SweepRun) -> PlannedJob:
        """The job of a run.

        Raises:
            ConfigError: its settings are wrong.
        """
        own = tuple(settings(run.values))
        common = [*self.overrides, *self._names(run.number)]
        (planned,) = plan_jobs(common, [[*common, *own]], run.number, self.run_dir)
        shown = tuple(override.removeprefix("++") for override in own)
        return replace(planned, job=replace(planned.job, overrides=shown))

    def command(self, run: SweepRun) -> str:
        """What trains the same as a run of the search, outside of it."""
        own = [*settings(run.values), f"run_dir={self.run_dir}/best"]
        return shlex.join(["python", "train.py", *self.overrides, *own])

    def reached(self, planned: PlannedJob) -> Sequence[float]:
        """Values of the metric so far."""
        stage = objective_stage(planned.configs)
        return self.read(Path(planned.configs[stage].run_dir) / stage, self.file.metric)

    def _names(self, number: int) -> list[str]:
        """How a run's own report and its logger call it."""
        goal = "maximize" if self.file.maximize else "minimize"
        names = [f"objective.metric={literal(self.file.metric)}", f"objective.goal={goal}"]
        if self.has_wandb:
            names.append(f"++logger.wandb.group={literal(self.run_dir)}")
            names.append(f"++logger.wandb.name='{number} ${{stage.name}}'")
        return names
