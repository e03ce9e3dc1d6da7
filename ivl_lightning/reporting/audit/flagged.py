"""Rows that break a quality rule. There may be millions, so sentences about them are made when they are written."""

from __future__ import annotations

from dataclasses import dataclass

from ivl_lightning.data.quality import (
    ANSWER_LENGTH,
    DUPLICATE,
    REPEATED_LINES,
    REPEATED_NGRAMS,
    SENTENCE_LENGTH,
    ZEROS,
    Hit,
)
from ivl_lightning.structures import Record

_MESSAGES = {
    REPEATED_LINES: "{value:.0%} of the lines repeat an earlier line, more than {limit:.0%}",
    REPEATED_NGRAMS: "{value:.0%} of the 10-grams repeat an earlier one, more than {limit:.0%}",
    SENTENCE_LENGTH: "a sentence of {value:,.0f} characters, more than {limit:,.0f}",
    ANSWER_LENGTH: "an answer of {value:,.0f} characters, more than {limit:,.0f}",
    ZEROS: "a run of {value:,.0f} zeros, more than {limit:,.0f}",
    DUPLICATE: "the same media, questions and answers as {original}",
}
_FIELDS = ("dataset", "file", "line", "id", "digest", "rule", "text", "value", "limit", "message")


@dataclass(frozen=True, slots=True)
class Flagged:
    """A row that breaks a quality rule.

    Attributes:
        dataset, file, line, id: the row.
        digest: 16 hexadecimal digits of the row's bytes, as in an exclusion list.
        rule: of `ivl_lightning.data.quality.RULES`.
        text: the place.
        value: what was found.
        limit: what the rule allows.
        original: place of the row that a duplicate repeats.
    """

    dataset: str
    file: str
    line: int
    id: str | None
    digest: str
    rule: str
    text: str
    value: float
    limit: float
    original: str = ""

    @property
    def message(self) -> str:
        """One sentence for a person."""
        if not self.value:
            return "the answer is empty"
        return _MESSAGES[self.rule].format(value=self.value, limit=self.limit, original=self.original)

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {name: getattr(self, name) for name in _FIELDS}


def flag(record: Record, hit: Hit, original: str = "") -> Flagged:
    """The finding about a row."""
    return Flagged(
        dataset=record.dataset,
        file=record.file,
        line=record.line,
        id=record.id,
        digest=record.digest,
        rule=hit.rule,
        text=hit.text,
        value=hit.value,
        limit=hit.limit,
        original=original,
    )
