"""What counts as a right answer to a row's last question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.dataset import name_of
from ivl_lightning.data.turns import split_last_answer
from ivl_lightning.structures import RowError

TRUTHS_KEY = "answers"


def truths_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """Answers that count as right: the texts of the row's `answers`, else the last answer of its conversation.

    Args:
        row: as parsed. Training does not look at `answers`.

    Raises:
        RowError: `answers_invalid` for anything but a list of texts; else as `parse_turns`.
    """
    answers = row.get(TRUTHS_KEY)
    if answers is None:
        return (split_last_answer(row)[1],)
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise RowError(
            "answers_invalid",
            f"{TRUTHS_KEY!r} is {str(answers)[:100]}: write a list of texts that each count as a right answer to the "
            "last question, or leave it out",
        )
    return tuple(answers)


def check_truths(corpus: Corpus, rows: Iterable[int]) -> None:
    """Look at what is right for rows that will be answered: better now than behind hours of training.

    Raises:
        ValueError: names the first row whose `answers` are wrong.
    """
    for row in rows:
        _, record = corpus.locate(row)
        try:
            truths_of(record.row)
        except RowError as error:
            raise ValueError(f"{name_of(record)} is to be answered in validation, but {error}") from error
