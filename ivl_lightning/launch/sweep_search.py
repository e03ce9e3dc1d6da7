"""The `sweeps` package, which searches for W&B: what to try next, and whom to stop; plain values in and out."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np

from ivl_lightning.config.check import ConfigError

TrialState = Literal["running", "finished", "failed"]


@dataclass(frozen=True, slots=True)
class Trial:
    """What the search knows of a run.

    Attributes:
        number: of the run.
        values: dotted key -> plain value.
        state: `finished` also where it was stopped for being hopeless: what it has reached counts.
        history: values of the metric so far, in the order of steps.
    """

    number: int
    values: Mapping[str, Any]
    state: TrialState
    history: Sequence[float]


def violations(definition: Mapping[str, Any]) -> list[str]:
    """What W&B's schema has against a sweep.

    Raises:
        ConfigError: the package is missing.
    """
    # W&B documents run_cap, but the schema of sweeps 0.2 does not know it.
    known = {key: value for key, value in definition.items() if key != "run_cap"}
    sweeps = _sweeps()
    try:
        found: list[str] = sweeps.config.schema_violations_from_proposed_config(known)
    except ValueError as error:
        # A parameter that is no mapping ends the check at once.
        return [str(error)]
    return found


def suggest(definition: Mapping[str, Any], trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """The values to try next; None where a grid is done.

    Args:
        definition: of the sweep.
        trials: in the order of their numbers.
        seed: the same suggestion follows from the same seed and trials.
    """
    sweeps = _sweeps()
    # The package draws from the global generators.
    random.seed(f"{seed}/{len(trials)}")
    np.random.seed([seed, len(trials)])
    with _quiet():
        run = sweeps.next_run(dict(definition), [_run(sweeps, definition, trial) for trial in trials])
    return None if run is None else {key: _plain(entry["value"]) for key, entry in run.config.items()}


def hopeless(definition: Mapping[str, Any], trials: Sequence[Trial]) -> list[int]:
    """Numbers of running trials that `early_terminate` gives up; none where the sweep has no such entry."""
    if "early_terminate" not in definition:
        return []
    sweeps = _sweeps()
    stopped = sweeps.stop_runs(dict(definition), [_run(sweeps, definition, trial) for trial in trials])
    return [int(run.name) for run in stopped]


def _run(sweeps: ModuleType, definition: Mapping[str, Any], trial: Trial) -> Any:
    metric = definition["metric"]["name"]
    # By the names of the service: under pydantic 2 the package's own are not taken.
    return sweeps.SweepRun(
        name=str(trial.number),
        state=trial.state,
        config={key: {"value": value} for key, value in trial.values.items()},
        sampledHistory=[{metric: value} for value in trial.history],
        summaryMetrics={metric: trial.history[-1]} if trial.history else {},
    )


def _plain(value: Any) -> Any:
    """Python's own types: the package gives numbers and arrays of numpy."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _sweeps() -> ModuleType:
    try:
        with _quiet():
            import sweeps
            import sweeps.config
    except ImportError as error:
        raise ConfigError("ivl-sweep needs W&B's search: pip install 'ivl-lightning[sweeps]'") from error
    return sweeps


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what it warns of: its own use of pydantic, and fits to few points."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
