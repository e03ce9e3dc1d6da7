"""Sample cards of a stage on disk: what the rows of its probe set were answered, step after step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

SAMPLES_NAME = "samples.jsonl"
"""The file, in the stage's folder."""

SHEETS_FOLDER = "probe"
"""Where its pictures lie, in the stage's folder."""


@dataclass(frozen=True, slots=True)
class SheetPlace:
    """A picture of a row, as the model got it.

    Attributes:
        file: contact sheet of its tiles, below the stage's folder.
        name: path of the picture or video in the row.
        note: size and grid.
    """

    file: str
    name: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCard:
    """One answer to one row.

    Attributes:
        step: finished optimizer steps of the stage when it was given.
        dataset, file, line: of the row.
        digest: hash of the row.
        question: what was asked.
        expected: the answer in the data.
        generated: that of the model.
        truths: all answers that count as right.
        metric: that scores the dataset.
        score: by that metric, 0 to 1.
        tiles: of the prompt.
        prompt_tokens: of the prompt, tiles included.
        pictures: in the order of the question.
    """

    step: int
    dataset: str
    file: str
    line: int
    digest: str
    question: str
    expected: str
    generated: str
    truths: list[str]
    metric: str
    score: float
    tiles: int
    prompt_tokens: int
    pictures: list[SheetPlace] = field(default_factory=list)

    @property
    def row(self) -> tuple[str, str, int, str]:
        """What tells the row from others, in any stage of a run."""
        return self.dataset, self.file, self.line, self.digest


_CARD = TypeAdapter(SampleCard)


def append_cards(file: Path, cards: Iterable[SampleCard]) -> None:
    """Write cards behind those that are there."""
    lines = "".join(json.dumps(asdict(card), ensure_ascii=False) + "\n" for card in cards)
    file.parent.mkdir(parents=True, exist_ok=True)
    # In one call, which a kill does not cut in two: others are written behind it.
    with file.open("ab", buffering=0) as stream:
        stream.write(lines.encode())


def read_cards(file: Path) -> list[SampleCard]:
    """Cards by rising step; of a step that was answered twice, before and after a restart, the later ones.

    Args:
        file: it need not exist. A last line that is being written is left out, and so are lines from before there was
            a probe set.
    """
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream if line.endswith("\n")]
    cards = [_CARD.validate_python(row) for row in rows if "score" in row]
    latest = {(card.step, card.row): card for card in cards}
    return sorted(latest.values(), key=lambda card: card.step)
