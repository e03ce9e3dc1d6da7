"""What it takes to make a run again: command, code, seed, machine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ivl_lightning.environment import FOLDER
from ivl_lightning.reporting.run_folder import Run, StageFolder
from ivl_lightning.reporting.table import NONE

_CHANGES = " with local changes"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where stages ran.

    Attributes:
        stages: their names, for people.
        facts: names and values.
    """

    stages: str
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a run is made again.

    Attributes:
        command: what to type, in any folder; None where the command was not kept.
        code: version and commit that trained the last stage.
        changed: whether the code had changes that no commit has.
        seed: of the last stage.
        machines: where it ran, each once.
    """

    command: str | None
    code: str
    changed: bool
    seed: str
    machines: list[Machine]


def how_to_make(run: Run) -> Recipe:
    """How a run is made again, as far as its folder tells."""
    starts = [start for stage in run.stages for start in stage.starts]
    last = starts[-1] if starts else {}
    commit = last.get("git commit", NONE)
    version = last.get("ivl-lightning")
    return Recipe(
        command=_command(run.command, last.get(FOLDER)),
        code=NONE if version is None else f"ivl-lightning {version}, commit {commit.removesuffix(_CHANGES)}",
        changed=commit.endswith(_CHANGES),
        seed=str(run.stages[-1].config.get("seed", NONE)) if run.stages else NONE,
        machines=_machines(run.stages),
    )


def _command(command: str | None, folder: str | None) -> str | None:
    """The command, preceded by the way to where it was given: its paths may be relative."""
    return command if command is None or folder is None else f"cd {shlex.quote(folder)}\n{command}"


def _machines(stages: Sequence[StageFolder]) -> list[Machine]:
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for stage in stages:
        for start in stage.starts:
            facts = tuple((name, value) for name, value in start.items() if name not in ("started", FOLDER))
            names = found.setdefault(facts, [])
            if stage.name not in names:
                names.append(stage.name)
    return [Machine(", ".join(names), dict(facts)) for facts, names in found.items()]
