"""Preference rows in the MMPR layout: `image` (optional), `question`, `chosen`, `rejected` -> one document of ids.

Source: `get_preference_item` of the original's `internvl_chat_mpo.py`: each answer is tokenized behind the question as
a conversation of its own. What both conversations begin with, up to the first supervised token, is the prompt that
the answers share here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.conversation import TokenizedRow
from ivl_lightning.data.layout import Layout
from ivl_lightning.structures import RowError

MEDIA_KEYS = ("image", "video", "clip")
_ANSWERS = ("chosen", "rejected")
_TEXTS = ("question", *_ANSWERS)


@dataclass(frozen=True, slots=True)
class TokenizedPair(TokenizedRow):
    """`[prompt | chosen | rejected]` with one context token for each image or frame, all in the prompt.

    Attributes:
        chosen, rejected: tokens of the two answers, each with what follows it.
    """

    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True)
class PairLayout(Layout):
    """A pair before pixels.

    Attributes:
        chosen, rejected: tokens of the two answers.
    """

    chosen: int = 0
    rejected: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer answer: the longer of the two conversations."""
        return self.tokens - min(self.chosen, self.rejected)

    @property
    def chosen_labels(self) -> int:
        """Supervised tokens of the chosen answer."""
        stop = len(self.row.labels) - self.rejected
        labels = self.row.labels[stop - self.chosen : stop]
        return len(labels) - labels.count(IGNORE_INDEX)


def conversations_of(row: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """The row as two conversations with the same question and media: chosen and rejected.

    Raises:
        RowError: `pair_invalid` where `question`, `chosen` or `rejected` is missing or no text, `empty_response` where
            an answer is blank, `equal_responses` where both answers are the same but for blanks at the ends.
    """
    question, chosen, rejected = (_text(row, key) for key in _TEXTS)
    for key, text in zip(_ANSWERS, (chosen, rejected), strict=True):
        if not text.strip():
            raise RowError("empty_response", f"{key!r} is empty: give both answers, or remove the pair")
    if chosen.strip() == rejected.strip():
        raise RowError(
            "equal_responses", "'chosen' and 'rejected' are the same, which prefers nothing: remove the pair"
        )
    media = {key: row[key] for key in MEDIA_KEYS if key in row}
    first, second = (
        {**media, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": text}]}
        for text in (chosen, rejected)
    )
    return first, second


def _text(row: Mapping[str, object], key: str) -> str:
    value = row.get(key)
    if isinstance(value, str):
        return value
    if "conversations" in row and key not in row:
        raise RowError(
            "pair_invalid", f"the row has conversations, but no {key!r}: preference rows have {', '.join(_TEXTS)}"
        )
    found = f"is of type {type(value).__name__}" if key in row else "is missing"
    raise RowError("pair_invalid", f"{key!r} {found}: write it as text")


def tokenize_pair(row: Mapping[str, object], tokenize: Callable[[Mapping[str, object]], TokenizedRow]) -> TokenizedPair:
    """One document of both conversations, their common beginning once.

    Args:
        row: as in the JSONL.
        tokenize: of a conversation.

    Raises:
        RowError: as `conversations_of` and `tokenize_row`; `equal_responses` where the answers differ in nothing that
            the tokenizer sees.
    """
    chosen, rejected = (tokenize(conversation) for conversation in conversations_of(row))
    if chosen.input_ids == rejected.input_ids:
        raise RowError("equal_responses", "'chosen' and 'rejected' give the same tokens: remove the pair")
    start = _shared_length(chosen, rejected)
    return TokenizedPair(
        chosen.input_ids + rejected.input_ids[start:],
        chosen.labels + rejected.labels[start:],
        chosen.slots,
        chosen=len(chosen.input_ids) - start,
        rejected=len(rejected.input_ids) - start,
    )


def _shared_length(chosen: TokenizedRow, rejected: TokenizedRow) -> int:
    """Tokens of the prompt: alike in both, and supervised in neither."""
    # strict=False: the conversations end at different places.
    positions = zip(chosen.input_ids, rejected.input_ids, chosen.labels, rejected.labels, strict=False)
    length = 0
    for one, other, label, other_label in positions:
        if one != other or label != IGNORE_INDEX or other_label != IGNORE_INDEX:
            break
        length += 1
    return length
