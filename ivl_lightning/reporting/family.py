"""The family of a run's last models: every stage and checkpoint that they came through, each once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ivl_lightning.checkpoints.lineage import Lineage, Origin
from ivl_lightning.reporting.run_folder import Run
from ivl_lightning.reporting.scaling_text import shown_path


@dataclass(frozen=True, slots=True)
class Member:
    """A network of the family.

    Attributes:
        name: of its stage, or of its folder where no stage is recorded.
        place: the folder that it lies in, as shown.
        run: name of the run or sequel whose own it is; None where it lies elsewhere.
        lineage: what its stage did; None of a checkpoint without a record.
        last: whether it is the last model of its run.
    """

    name: str
    place: str
    run: str | None
    lineage: Lineage | None
    last: bool


@dataclass(frozen=True, slots=True)
class Descent:
    """What a member got from another; both by their places among the members."""

    parent: int
    child: int
    brings: list[str]
    donor: bool


@dataclass(frozen=True, slots=True)
class Family:
    """Members, parents before their children, and who came from whom."""

    members: list[Member]
    descents: list[Descent]


def family(run: Run) -> Family | None:
    """The family of the last model of a run and of each sequel; None where none of them has a lineage."""
    collected = _Collected(run)
    for one in (run, *run.sequels):
        last = next((stage.lineage for stage in reversed(one.stages) if stage.lineage is not None), None)
        if last is not None:
            collected.add(last)
    return Family(collected.members, collected.descents) if collected.members else None


class _Collected:
    """Members by what is recorded of them: a stage that was trained twice in one folder is two."""

    def __init__(self, run: Run) -> None:
        self.members: list[Member] = []
        self.descents: list[Descent] = []
        self._places: dict[str, int] = {}
        self._folder = run.folder.resolve()
        self._runs = {_id(lineage): name for name, lineage, _ in _recorded(run)}
        self._last = {_id(lineage) for _, lineage, last in _recorded(run) if last}

    def add(self, lineage: Lineage) -> int:
        """Add a stage after all that it came from; gives its place."""
        known = _id(lineage)
        if known in self._places:
            return self._places[known]
        parents = [self._add_origin(origin) for origin in lineage.origins]
        folder = Path(lineage.folder)
        place = self._append(
            known, Member(folder.name, self._shown(folder.parent), self._runs.get(known), lineage, known in self._last)
        )
        self.descents += [
            Descent(parent, place, origin.brings, origin.donor)
            for parent, origin in zip(parents, lineage.origins, strict=True)
        ]
        return place

    def _add_origin(self, origin: Origin) -> int:
        if origin.lineage is not None:
            return self.add(origin.lineage)
        if origin.path in self._places:
            return self._places[origin.path]
        path = Path(origin.path)
        return self._append(origin.path, Member(path.name, self._shown(path.parent), None, None, False))

    def _append(self, known: str, member: Member) -> int:
        self._places[known] = len(self.members)
        self.members.append(member)
        return self._places[known]

    def _shown(self, folder: Path) -> str:
        # The run's own folder too is shown by its name.
        return shown_path(str(folder), self._folder.parent)


def _recorded(run: Run) -> Iterator[tuple[str, Lineage, bool]]:
    """Every lineage of a run and of its sequels, with the name of its run and whether it is the last there."""
    for one in (run, *run.sequels):
        lineages = [stage.lineage for stage in one.stages if stage.lineage is not None]
        for lineage in lineages:
            yield one.name, lineage, lineage is lineages[-1]


def _id(lineage: Lineage) -> str:
    # Without its origins, which may reach far back: its hashes tell it from another of the same folder.
    return repr(replace(lineage, origins=[]))
