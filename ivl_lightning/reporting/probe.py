"""The probe set in a report: what each row was answered over time, stage beside stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ivl_lightning.constants import IMAGE_PLACEHOLDER
from ivl_lightning.data.sample_file import SampleCard
from ivl_lightning.reporting.run_folder import StageFolder
from ivl_lightning.reporting.sheets import Sheet, embedded

MOST_ROWS = 24
_MOST_SPELLS = 5
_LAST_SPELLS = 3


@dataclass(frozen=True, slots=True)
class Spell:
    """Steps at which a row was answered alike.

    Attributes:
        first, last: of these steps.
        generated: the answer.
        score: of the answer.
    """

    first: int
    last: int
    generated: str
    score: float

    @property
    def mark(self) -> str:
        """How right it is: `right`, `wrong`, or `partly`."""
        return "right" if self.score == 1 else "wrong" if self.score == 0 else "partly"

    @property
    def when(self) -> str:
        """The steps, for people."""
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,} to {self.last:,}"


@dataclass(frozen=True, slots=True)
class StageSpells:
    """What a stage answered to one row.

    Attributes:
        early: the first spells, or all where they are few.
        hidden: how many follow that are not shown.
        late: the last spells behind those.
    """

    early: list[Spell]
    hidden: int
    late: list[Spell]


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A row of the probe set.

    Attributes:
        card: its last answer; for what does not change.
        question: what was asked.
        sheets: its pictures.
        stages: what each stage answered, empty where it was not asked.
    """

    card: SampleCard
    question: str
    sheets: list[Sheet]
    stages: list[StageSpells]


@dataclass(frozen=True, slots=True)
class ProbeTable:
    """The probe sets of a run.

    Attributes:
        stages: those that asked, and how they did at their end, for people.
        rows: at most `MOST_ROWS`.
        total: rows that were asked.
    """

    stages: list[tuple[str, str]]
    rows: list[ProbeRow]
    total: int


def probe_table(stages: Sequence[StageFolder]) -> ProbeTable | None:
    """All rows that any stage asked, in the order in which they were first asked; None where none was."""
    asked = [stage for stage in stages if stage.samples]
    if not asked:
        return None
    rows = list(dict.fromkeys(card.row for stage in asked for card in stage.samples))
    return ProbeTable(
        stages=[(stage.name, _outcome(stage)) for stage in asked],
        rows=[_row(row, asked) for row in rows[:MOST_ROWS]],
        total=len(rows),
    )


def _outcome(stage: StageFolder) -> str:
    last = {card.row: card.score for card in stage.samples}
    right = sum(score == 1 for score in last.values())
    return f"{right} of {len(last)} right behind step {stage.samples[-1].step:,}"


def _row(row: tuple[str, str, int, str], stages: Sequence[StageFolder]) -> ProbeRow:
    by_stage = [[card for card in stage.samples if card.row == row] for stage in stages]
    stage, cards = next(
        (stage, cards) for stage, cards in zip(reversed(stages), reversed(by_stage), strict=True) if cards
    )
    card = cards[-1]
    question = card.question
    if len(card.pictures) == 1:
        # With several pictures the placeholders say which one is meant; a single one stands beside the question.
        question = question.replace(IMAGE_PLACEHOLDER, "").strip()
    sheets = [embedded(place, stage.folder) for place in card.pictures]
    return ProbeRow(card, question, sheets, [_spells(cards) for cards in by_stage])


def _spells(cards: Sequence[SampleCard]) -> StageSpells:
    spells = []
    for (generated, score), group in groupby(cards, key=lambda card: (card.generated, card.score)):
        alike = list(group)
        spells.append(Spell(alike[0].step, alike[-1].step, generated, score))
    if len(spells) <= _MOST_SPELLS:
        return StageSpells(spells, 0, [])
    return StageSpells(spells[:1], len(spells) - 1 - _LAST_SPELLS, spells[-_LAST_SPELLS:])
