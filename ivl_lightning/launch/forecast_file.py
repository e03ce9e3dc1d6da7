"""A forecast as JSON: every number, in bytes, floating-point operations and seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.plan import PlanConfig
from ivl_lightning.launch.forecast import StageForecast
from ivl_lightning.planning.forecast import Forecast


def write_forecast(stages: Mapping[str, StageForecast], plan: PlanConfig, path: Path) -> None:
    """Write the forecast of a run.

    Args:
        stages: stage name -> its forecast, in order.
        plan: what was taken for granted.
        path: of the file.

    Raises:
        ConfigError: it cannot be written.
    """
    content = {"plan": asdict(plan), "stages": {name: as_numbers(stage) for name, stage in stages.items()}}
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plan.json={path} cannot be written ({error.strerror})") from error


def as_numbers(stage: StageForecast) -> dict[str, Any]:
    """The forecast of a stage as plain numbers, texts and lists."""
    forecast = stage.forecast
    seconds = None if stage.steps is None else stage.steps * forecast.pace.step
    return {
        "gpu": asdict(forecast.gpu),
        "layout": asdict(forecast.layout),
        "parameters": {part: asdict(count) for part, count in forecast.network.parts.items()},
        "memory": _memory(forecast) | {"host": forecast.memory.host},
        "load": asdict(forecast.load),
        "work": asdict(forecast.work),
        "seconds_per_step": asdict(forecast.pace) | {"step": forecast.pace.step},
        "mfu": forecast.mfu,
        "steps": stage.steps,
        "steps_counted": stage.exact,
        "seconds": seconds,
        "gpu_hours": None if seconds is None else seconds * forecast.layout.ranks / 3600,
        "checkpoint_bytes": forecast.checkpoint,
        "weights_bytes": forecast.weights,
        "changes": [
            {"settings": remedy.settings, "added": remedy.added, **_memory(remedy.forecast)}
            for remedy in stage.remedies
        ],
        "notes": stage.notes,
    }


def _memory(forecast: Forecast) -> dict[str, Any]:
    memory = forecast.memory
    return {"peak": memory.peak, "at": memory.peak_moment, "fits": forecast.fits, "moments": memory.moments}
