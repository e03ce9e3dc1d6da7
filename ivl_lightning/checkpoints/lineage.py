"""Where a stage's network came from and what has trained it: lineage.json beside the stage's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ivl_lightning.constants import WEIGHTS_FOLDER
from ivl_lightning.whole_files import write_whole

LINEAGE_NAME = "lineage.json"
FORMAT = 1
_REMEDY = "Copy it again from the run, or delete it: weights can be used without"


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A part of the network before and after a stage.

    Attributes:
        parameters: how many numbers it holds.
        before: hash of its names, shapes and values as the stage began; None where it was not taken.
        after: the same as the stage ended.
    """

    parameters: int
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a stage's network, or parts of it, were read from.

    Attributes:
        path: of the weights.
        brings: which of vision, projector and llm.
        donor: whether it gives a tower that was trained beside another language model (progressive scaling).
        lineage: of what lies there; None where none is recorded, as of a released checkpoint.
    """

    path: str
    brings: list[str]
    donor: bool
    lineage: Lineage | None


@dataclass(frozen=True, slots=True)
class Lineage:
    """A stage's network: what the stage did to it, and where it came from.

    Attributes:
        stage: its class or name.
        folder: absolute path of its folder.
        trained: parts that trained; `vision (LoRA)` counts as vision.
        steps: optimizer steps.
        tokens: that it trained on, text and image; None where they were not counted.
        parts: part -> its record.
        origins: none where all its weights were random.
    """

    stage: str
    folder: str
    trained: list[str]
    steps: int
    tokens: int | None
    parts: dict[str, PartRecord]
    origins: list[Origin]

    def trains(self, part: str) -> bool:
        """Whether the stage trained a part, or adapters of it."""
        return any(name.partition(" ")[0] == part for name in self.trained)

    def sources(self, part: str) -> list[Origin]:
        """Where a part was read from."""
        return [origin for origin in self.origins if part in origin.brings]


def read_lineage(folder: Path) -> Lineage | None:
    """The lineage of a stage's folder, or of its folder of weights.

    Returns:
        None where there is none.

    Raises:
        CheckpointError: its file is damaged, or of a later format.
    """
    places = [folder, folder.parent] if folder.name == WEIGHTS_FOLDER else [folder]
    files = (place / LINEAGE_NAME for place in places)
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else _read(file)


def write_lineage(lineage: Lineage, folder: Path) -> None:
    """Write lineage.json, whole or not at all."""
    write_whole(folder / LINEAGE_NAME, json.dumps(_flat(lineage), indent=2, ensure_ascii=False) + "\n")


def ancestors(lineage: Lineage) -> list[Lineage]:
    """The stages that its network came through, without itself: oldest first, each folder once."""
    found: dict[str, Lineage] = {}
    for one in _oldest_first(lineage):
        found.setdefault(one.folder, one)
    return [one for folder, one in found.items() if folder != lineage.folder]


def tower_tokens(lineage: Lineage) -> int | None:
    """Tokens that its vision tower was trained on: by the stage itself, and by those that the tower came through.

    What a released checkpoint was trained on is not recorded, and not in the sum.

    Returns:
        None where a stage did not count its tokens.
    """
    line = {one.folder: one for one in _tower_line(lineage)}.values()
    counts = [one.tokens for one in line if one.trains("vision")]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def has_trained_tower(lineage: Lineage) -> bool:
    """Whether any stage, or a checkpoint without a record, trained the vision tower; else its numbers are random."""
    line = list(_tower_line(lineage))
    unrecorded = any(origin.lineage is None for one in line for origin in one.sources("vision"))
    return unrecorded or any(one.trains("vision") for one in line)


def _oldest_first(lineage: Lineage) -> Iterator[Lineage]:
    for origin in lineage.origins:
        if origin.lineage is not None:
            yield from _oldest_first(origin.lineage)
    yield lineage


def _tower_line(lineage: Lineage) -> Iterator[Lineage]:
    """A stage and those that its vision tower came through, newest first."""
    yield lineage
    for origin in lineage.sources("vision"):
        if origin.lineage is not None:
            yield from _tower_line(origin.lineage)


# -- the file ---------------------------------------------------------------------------------------------------------
# A flat list: an ancestor that is reached twice stands there once, and no family is too deep for a JSON reader.


@dataclass(frozen=True, slots=True)
class _OriginEntry:
    path: str
    brings: list[str]
    donor: bool
    stage: int | None


@dataclass(frozen=True, slots=True)
class _StageEntry:
    stage: str
    folder: str
    trained: list[str]
    steps: int
    tokens: int | None
    parts: dict[str, PartRecord]
    origins: list[_OriginEntry]


@dataclass(frozen=True, slots=True)
class _File:
    """What lineage.json holds.

    Attributes:
        format: its version.
        stages: oldest first, the stage itself last; an origin names its stage by the place in this list, from 0.
    """

    format: Literal[1]
    stages: list[_StageEntry]


def _flat(lineage: Lineage) -> dict[str, Any]:
    entries: dict[str, int] = {}
    _enter(lineage, entries)
    return {"format": FORMAT, "stages": [json.loads(entry) for entry in entries]}


def _enter(lineage: Lineage, entries: dict[str, int]) -> int:
    """The place of a stage among the entries, which map their text to their place; ancestors come before it."""
    origins = [
        _OriginEntry(
            origin.path,
            origin.brings,
            origin.donor,
            None if origin.lineage is None else _enter(origin.lineage, entries),
        )
        for origin in lineage.origins
    ]
    entry = _StageEntry(
        stage=lineage.stage,
        folder=lineage.folder,
        trained=lineage.trained,
        steps=lineage.steps,
        tokens=lineage.tokens,
        parts=lineage.parts,
        origins=origins,
    )
    return entries.setdefault(json.dumps(asdict(entry)), len(entries))


def _read(file: Path) -> Lineage:
    content = _object(file)
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise _error(
            file, f"is of format {version}, known here is {FORMAT}: use the version that wrote it, or a later one"
        )
    try:
        entries = TypeAdapter(_File).validate_json(json.dumps(content), strict=True).stages
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise _error(file, f"is damaged ({place}: {fault['msg']}). {_REMEDY}") from error
    stages: list[Lineage] = []
    for entry in entries:
        origins = [_origin(origin, stages, file) for origin in entry.origins]
        stages.append(
            Lineage(
                stage=entry.stage,
                folder=entry.folder,
                trained=entry.trained,
                steps=entry.steps,
                tokens=entry.tokens,
                parts=entry.parts,
                origins=origins,
            )
        )
    if not stages:
        raise _error(file, f"is damaged (it names no stage). {_REMEDY}")
    return stages[-1]


def _origin(entry: _OriginEntry, older: list[Lineage], file: Path) -> Origin:
    if entry.stage is not None and not 0 <= entry.stage < len(older):
        raise _error(file, f"is damaged (stage {len(older)} comes from stage {entry.stage}, no older one). {_REMEDY}")
    lineage = None if entry.stage is None else older[entry.stage]
    return Origin(entry.path, entry.brings, entry.donor, lineage)


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _error(file, f"is not valid JSON ({error}). {_REMEDY}") from error
    if not isinstance(content, dict):
        raise _error(file, f"holds a {type(content).__name__}, needed is an object. {_REMEDY}")
    return content


def _error(file: Path, fault: str) -> Exception:
    # Imported late: it brings torch, which whoever only reads a lineage need not wait for.
    from ivl_lightning.checkpoints.source import CheckpointError

    return CheckpointError(f"{file} {fault}")
