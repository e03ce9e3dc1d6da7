"""What a search has tried, on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.launch.finished import deciding_settings
from ivl_lightning.launch.planned_jobs import State
from ivl_lightning.launch.sweep_file import SweepFile
from ivl_lightning.whole_files import write_whole

STATE_NAME = "sweep.json"
_COMPARED = ("method", "metric", "parameters", "early_terminate")
_ENDED = ("finished", "stopped early")


@dataclass(slots=True)
class SweepRun:
    """One run of a search.

    Attributes:
        number: of the run, which names its folder.
        values: dotted key -> plain value.
        state: `running` also where the search was killed with it.
        exit_code: of its process; None while it runs.
        seconds: wall time of all its tries.
    """

    number: int
    values: dict[str, Any]
    state: State = "waiting"
    exit_code: int | None = None
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether it is not tried again."""
        return self.state in _ENDED


@dataclass(slots=True)
class SweepState:
    """What `sweep.json` holds.

    Attributes:
        sweep: name of the file.
        settings: what makes runs comparable: of the sweep, its seed, and each stage of the first run.
        runs: in the order in which they were suggested.
    """

    sweep: str
    settings: dict[str, Any]
    runs: list[SweepRun] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write sweep.json, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / STATE_NAME, json.dumps(asdict(self), indent=2, ensure_ascii=False))


def read_state(folder: Path) -> SweepState | None:
    """What a search has tried in this folder; None where none was begun."""
    path = folder / STATE_NAME
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return SweepState(values["sweep"], values["settings"], [SweepRun(**run) for run in values["runs"]])


def comparable(file: SweepFile, seed: int, configs: Mapping[str, RunConfig]) -> dict[str, Any]:
    """What must stay as it is for later runs of a search to be compared with the earlier ones.

    Args:
        file: of the sweep.
        seed: of the search.
        configs: stage name -> its configuration, of the first run.
    """
    found = {f"sweep {name}": file.definition.get(name) for name in _COMPARED}
    for stage, config in configs.items():
        found |= {f"{stage}: {key}": value for key, value in deciding_settings(config).items()}
    return json.loads(json.dumps({**found, "seed": seed}))


def check_comparable(state: SweepState, now: Mapping[str, Any], folder: Path) -> None:
    """A search goes on only as it was begun.

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    then = state.settings
    for key in dict.fromkeys([*now, *then]):
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} holds a search that was begun with {key}={then.get(key)!r}, this command says "
                f"{now.get(key)!r}: use another run_dir, or delete {folder} to begin anew"
            )
