"""How many optimizer steps a run will take, known at its start without planning an epoch."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ivl_lightning.data.index_file import writing
from ivl_lightning.data.plan import TrainingPlan

_USUAL_FILL = 0.998
"""Share of the lower bound that the planner reaches on mixtures like those of the paper (docs/benchmarks.md)."""


@dataclass(frozen=True, slots=True)
class Horizon:
    """Length of a run.

    Attributes:
        steps: optimizer steps of the whole run.
        estimated: true where no pass over this mixture was counted before.
    """

    steps: int
    estimated: bool


def horizon(plan: TrainingPlan, *, max_steps: int | None, epochs: int | None, cache_dir: Path | None) -> Horizon | None:
    """`max_steps`; else the step count of an earlier pass; else the lower bound over the usual fill.

    Where both steps and epochs end a run, the earlier end counts.

    Args:
        plan: of the run.
        max_steps: of the trainer; None or -1 for none.
        epochs: of the trainer; None where only steps end the run.
        cache_dir: folder of the indexes, where passes are counted.

    Returns:
        None for a run without an end.
    """
    limit = None if max_steps is None or max_steps < 0 else max_steps
    if epochs is None:
        return None if limit is None else Horizon(limit, estimated=False)
    whole = _epochs_long(plan, epochs, cache_dir)
    return Horizon(limit, estimated=False) if limit is not None and limit <= whole.steps else whole


def _epochs_long(plan: TrainingPlan, epochs: int, cache_dir: Path | None) -> Horizon:
    if plan.steps_per_epoch is not None:
        return Horizon(plan.steps_per_epoch * epochs, estimated=False)
    counted = None if cache_dir is None else read_steps(plan, cache_dir)
    if counted is not None:
        return Horizon(counted * epochs, estimated=False)
    return Horizon(math.ceil(plan.fewest_steps() / _USUAL_FILL) * epochs, estimated=True)


def read_steps(plan: TrainingPlan, cache_dir: Path) -> int | None:
    """Steps of an epoch as an earlier pass counted them; None where there was none."""
    path = _path(plan, cache_dir)
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["steps_per_epoch"]) if path.is_file() else None
    except (ValueError, KeyError, TypeError):
        # A count is a convenience: a damaged one is made again by the next pass.
        return None


def write_steps(plan: TrainingPlan, cache_dir: Path, steps: int) -> None:
    """Keep the steps of an epoch for later runs over the same mixture.

    Raises:
        IndexWriteError: the folder does not take the file.
    """
    with writing(_path(plan, cache_dir)) as aside:
        aside.write_text(json.dumps({"steps_per_epoch": steps}), encoding="utf-8")


def _path(plan: TrainingPlan, cache_dir: Path) -> Path:
    settings = asdict(plan.settings)
    # The number of steps of an epoch depends neither on how many epochs follow nor on how labels are weighed, and
    # where `batch_samples` decides it nothing is counted.
    for name in ("epochs", "reduction", "batch_samples"):
        del settings[name]
    content = json.dumps({"settings": settings, "mixture": [asdict(share) for share in plan.mixture]}, sort_keys=True)
    return cache_dir / f"steps-{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"
