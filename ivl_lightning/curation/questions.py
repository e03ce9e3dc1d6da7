"""Rows of conversations as questions to ask: one question, its answer, its media."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ivl_lightning.config.preferences import PromptStyle
from ivl_lightning.curation.prompts import ask
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.ledger import reject
from ivl_lightning.data.turns import parse_turns
from ivl_lightning.structures import Record, Reject, RowError

_MEDIA = ("image", "video", "clip")
_ON_PURPOSE = ("multi_turn", "system_turn", "no_image")
"""Reasons that do not count against `data.reject_limit`."""


@dataclass(frozen=True, slots=True)
class Question:
    """A row that is asked.

    Attributes:
        record: the row.
        text: the question as it is put to the model, with its placeholders.
        truth: the answer in the data.
    """

    record: Record
    text: str
    truth: str

    @property
    def media(self) -> dict[str, object]:
        """What the row names of media, as in the data; empty for text."""
        return {key: self.record.row[key] for key in _MEDIA if self.record.row.get(key)}

    @property
    def prompt(self) -> Record:
        """The question alone, to be encoded."""
        return self._asking(self.text, self.media)

    def blind_prompt(self, text: str) -> Record:
        """This text, to be encoded in the place of the question, without image or video."""
        return self._asking(text, {})

    def _asking(self, text: str, media: dict[str, object]) -> Record:
        return replace(self.record, row={**media, "conversations": [{"from": "human", "value": text}]})


@dataclass(frozen=True, slots=True)
class Questions:
    """The questions of one dataset, in file order, read anew each time: they need not fit into memory.

    Attributes:
        corpus: of this dataset alone.
        rows: its rows that are asked.
        style: how.
        left_out: rows that were never usable, and those that are not asked.
    """

    corpus: Corpus
    rows: tuple[int, ...]
    style: PromptStyle
    left_out: tuple[Reject, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def encoder(self) -> RowEncoder:
        """Of the dataset."""
        return self.corpus.encoders[0]

    @property
    def name(self) -> str:
        """Of the dataset."""
        return self.encoder.spec.name

    def read(self, start: int, stop: int) -> list[Question]:
        """Questions number `start` to `stop` - 1; fewer at the end.

        Raises:
            RowError: the annotation file was changed meanwhile.
        """
        return [_question(self.corpus.locate(row)[1], self.style) for row in self.rows[start:stop]]

    def __iter__(self) -> Iterator[Question]:
        return (question for number in range(len(self)) for question in self.read(number, number + 1))


def find_questions(corpus: Corpus, style: PromptStyle, *, with_media: bool) -> Questions:
    """Look through a dataset for rows that can be asked.

    Left out on purpose, and not counted against `data.reject_limit`, are rows with more than one question
    (`multi_turn`), with a system turn, for which preference rows have no place (`system_turn`), and, with `with_media`,
    rows without image or video (`no_image`).

    Args:
        corpus: of one dataset.
        style: how the questions will be asked.
        with_media: rows without image or video are of no use.
    """
    rows: list[int] = []
    left_out: list[Reject] = [*corpus.rejects]
    for row in range(len(corpus)):
        _, record = corpus.place(row)
        try:
            _, record = corpus.locate(row)
            question = _question(record, style)
            if with_media and not question.media:
                raise RowError("no_image", "the row has no image or video to leave out: use method=correctness for it")
        except RowError as error:
            left_out.append(replace(reject(record, error), counted=error.reason not in _ON_PURPOSE))
        else:
            rows.append(row)
    return Questions(corpus, tuple(rows), style, tuple(left_out))


def _question(record: Record, style: PromptStyle) -> Question:
    turns = parse_turns(record.row)
    if turns[0].role == "system":
        raise RowError("system_turn", "preference rows have no place for a system turn: remove it to ask the question")
    if len(turns) > 2:
        raise RowError("multi_turn", f"the row has {len(turns) // 2} questions: split it into rows of one question")
    return Question(record, ask(turns[0].text, style), turns[1].text.strip())
