"""Hands the jobs of any Hydra sweeper to `train.py`. Hydra makes plugins of the namespace `hydra_plugins` only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RunsJobs(Protocol):
    """A task function that runs jobs by itself."""

    def run_jobs(self, master: DictConfig, batch: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        """Run a batch of jobs.

        Args:
            master: composed without what is swept.
            batch: overrides of each job.
            first: number of the first.
        """


class JobLauncher(Launcher):
    """Asks the task function to run the jobs; Hydra's own would call it once for each, in this process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        assert hasattr(task_function, "run_jobs"), "hydra/launcher=ivl_lightning is for train.py"
        self._task = cast(RunsJobs, task_function)
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch."""
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        HydraConfig.instance().set_config(self._config)
        return self._task.run_jobs(self._config, job_overrides, initial_job_idx)


ConfigStore.instance().store(
    group="hydra/launcher",
    name="ivl_lightning",
    node={"_target_": f"{JobLauncher.__module__}.{JobLauncher.__name__}"},
    provider="ivl_lightning",
)
