"""A run folder as a report sees it: what each stage says it did, logged, answered and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ivl_lightning.checkpoints.lineage import Lineage, read_lineage
from ivl_lightning.constants import STAGES, TILE_CURVE_NAME
from ivl_lightning.data.sample_file import SAMPLES_NAME, SampleCard, read_cards
from ivl_lightning.environment import ENVIRONMENT_NAME
from ivl_lightning.reporting.logged_metrics import Metrics, complete_lines, read_metrics

_MARKS = ("config.yaml", "done.json")
"""A folder with one of these is a stage's."""


@dataclass(frozen=True, slots=True)
class StageSummary:
    """Outcome of a stage; of one that is not finished, as far as its log goes.

    Attributes:
        stage: its name.
        trained: parts that trained.
        steps: optimizer steps.
        loss_first: training loss of the first logged step, NaN where none was logged.
        loss_last: the same of the last one.
        scores: last validation metrics, by their logged names.
        seconds: wall time, NaN where it is not known.
        rejected: rows left out, by reason.
    """

    stage: str
    trained: list[str]
    steps: int
    loss_first: float
    loss_last: float
    scores: dict[str, float]
    seconds: float
    rejected: dict[str, int]


@dataclass(frozen=True, slots=True)
class StageFolder:
    """Everything a stage left in its folder.

    Attributes:
        summary: its outcome.
        finished: whether it came to its end.
        metrics: what it logged.
        samples: answers of its probe set, by rising step.
        ledger: rows it left out.
        config_text: its resolved settings as written; empty where there are none.
        lineage: where its network came from; None where that was not written.
        starts: where it ran, from its first start to the last; empty where that was not written.
        tile_curve: scores at several tile limits; empty where they were not asked for.
        folder: its own.
    """

    summary: StageSummary
    finished: bool
    metrics: Metrics
    samples: list[SampleCard]
    ledger: list[dict[str, Any]]
    config_text: str
    lineage: Lineage | None
    starts: list[dict[str, str]]
    tile_curve: list[dict[str, Any]]
    folder: Path

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.summary.stage

    @property
    def config(self) -> dict[str, Any]:
        """Its settings; empty where there are none."""
        return yaml.safe_load(self.config_text) or {}


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder.

    Attributes:
        folder: where it lies.
        stages: started and finished stages, in the order of the chain.
        command: the command line that made it; None if it was not kept.
        sequels: runs in its sub-folders, in the order of `recipe.sequels`.
    """

    folder: Path
    stages: list[StageFolder]
    command: str | None
    sequels: list[Run] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """Read what a run folder holds; whatever is missing stays empty."""
    stages = [_read_stage(path) for path in sorted(stage_folders(folder), key=_place)]
    command = folder / "command.txt"
    return Run(
        folder=folder,
        stages=stages,
        command=command.read_text(encoding="utf-8").strip() if command.is_file() else None,
        sequels=[read_run(path) for path in _sequel_folders(folder, stages)],
    )


def job_folders(folder: Path) -> list[Path]:
    """Runs of a multirun, by their numbers; none where it is no multirun."""
    jobs = [path for path in folder.glob("[0-9]*") if path.name.isdigit() and stage_folders(path)]
    return sorted(jobs, key=lambda path: int(path.name))


def stage_folders(folder: Path) -> set[Path]:
    """Sub-folders that stages have begun in."""
    return {path.parent for mark in _MARKS for path in folder.glob(f"*/{mark}") if path.is_file()}


def _sequel_folders(folder: Path, stages: Sequence[StageFolder]) -> list[Path]:
    """Sub-folders that hold stages and are none; those that the recipe names first, in its order."""
    others = {path for path in folder.iterdir() if path.is_dir()} - stage_folders(folder)
    named = list(stages[0].config.get("recipe", {}).get("sequels") or {}) if stages else []
    order = {name: place for place, name in enumerate(named)}
    # Runs of a multirun bear numbers and have reports of their own.
    found = [path for path in others if stage_folders(path) and not path.name.isdigit()]
    return sorted(found, key=lambda path: (order.get(path.name, len(order)), path.name))


def _place(folder: Path) -> tuple[int, str]:
    # Not by file times: they do not survive a copy of the run.
    known = folder.name in STAGES
    return STAGES.index(folder.name) if known else len(STAGES), folder.name


def _read_stage(folder: Path) -> StageFolder:
    metrics = read_metrics(folder)
    config = folder / "config.yaml"
    config_text = config.read_text(encoding="utf-8") if config.is_file() else ""
    done = folder / "done.json"
    finished = done.is_file()
    return StageFolder(
        summary=_finished(json.loads(done.read_text(encoding="utf-8")))
        if finished
        else _unfinished(folder.name, metrics, yaml.safe_load(config_text) or {}),
        finished=finished,
        metrics=metrics,
        samples=read_cards(folder / SAMPLES_NAME),
        ledger=_read_json_lines(folder / "ledger.jsonl"),
        config_text=config_text,
        lineage=read_lineage(folder),
        starts=_read_json(folder / ENVIRONMENT_NAME),
        tile_curve=_read_json(folder / TILE_CURVE_NAME),
        folder=folder,
    )


def _finished(done: Mapping[str, Any]) -> StageSummary:
    return StageSummary(**{name: done[name] for name in StageSummary.__slots__})


def _unfinished(name: str, metrics: Metrics, config: Mapping[str, Any]) -> StageSummary:
    losses = metrics.series("train/loss")
    return StageSummary(
        stage=name,
        trained=config.get("stage", {}).get("trainable") or [],
        steps=losses[-1][0] if losses else 0,
        loss_first=losses[0][1] if losses else math.nan,
        loss_last=losses[-1][1] if losses else math.nan,
        scores=metrics.last("val/"),
        seconds=math.nan,
        rejected={},
    )


def _read_json(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in complete_lines(file)]
