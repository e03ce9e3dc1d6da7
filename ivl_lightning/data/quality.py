"""Quality of a row's text by rules: the heuristics of the InternVL 2.5 paper that need no language model.

A hit is a reason to look, not a verdict: a table, a poem or a program may repeat itself rightly.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ivl_lightning.structures import Turn

REPEATED_LINES, REPEATED_NGRAMS, ZEROS = "repeated_lines", "repeated_ngrams", "zeros"
SENTENCE_LENGTH, ANSWER_LENGTH, DUPLICATE = "sentence_length", "answer_length", "duplicate"
RULES = (REPEATED_LINES, REPEATED_NGRAMS, SENTENCE_LENGTH, ANSWER_LENGTH, ZEROS, DUPLICATE)

_EXCERPT = 200
_NGRAM = 10
# Kana and Han: written without blanks, so each character counts as a word. Hangul has blanks.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[。！？\n]+")
_ZEROS = re.compile(r"0+")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """What is still taken for normal.

    Attributes:
        line_share: share of a text's lines that repeat an earlier line.
        repeated_lines: repeats below this number are never a hit.
        ngram_share: share of a text's 10-grams that repeat an earlier one.
        sentence_characters: length of a sentence.
        answer_characters: length of an answer; an empty one is a hit too.
        zeros: length of a run of the digit 0.
    """

    line_share: float = 0.4
    repeated_lines: int = 3
    ngram_share: float = 0.4
    sentence_characters: int = 1000
    answer_characters: int = 20_000
    zeros: int = 15


@dataclass(frozen=True, slots=True)
class Hit:
    """A rule that a text breaks.

    Attributes:
        rule: its name, one of `RULES`.
        text: the place, cut to what can be read at a glance.
        value: what was found.
        limit: what the rule allows.
    """

    rule: str
    text: str
    value: float
    limit: float


def check_turns(turns: Sequence[Turn], limits: QualityLimits | None = None) -> tuple[Hit, ...]:
    """Hits of a conversation: of each rule at most one, in its worst text. System turns are not looked at.

    Args:
        turns: of the row, with placeholders; a row of 24 pictures repeats those rightly, so they are left out.
        limits: what is allowed.
    """
    limits = limits or QualityLimits()
    worst: dict[str, Hit] = {}
    for hit in _hits(turns, limits):
        if hit.rule not in worst or hit.value > worst[hit.rule].value:
            worst[hit.rule] = hit
    return tuple(worst.values())


def _hits(turns: Sequence[Turn], limits: QualityLimits) -> Iterator[Hit]:
    for turn in turns:
        if turn.role == "system":
            continue
        text = turn.text.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "")
        if turn.role == "gpt":
            yield from _answer_length(text, limits)
        yield from _repetition(text, limits)
        yield from _lengths(text, limits)


def _answer_length(text: str, limits: QualityLimits) -> Iterator[Hit]:
    length = len(text.strip())
    if length == 0:
        yield Hit(ANSWER_LENGTH, "", 0, 1)
    elif length > limits.answer_characters:
        yield Hit(ANSWER_LENGTH, excerpt(text), length, limits.answer_characters)


def _repetition(text: str, limits: QualityLimits) -> Iterator[Hit]:
    share, count, line = repeated_lines(text)
    if share > limits.line_share and count >= limits.repeated_lines:
        yield Hit(REPEATED_LINES, excerpt(line), share, limits.line_share)
    share, ngram = repeated_ngrams(text)
    if share > limits.ngram_share:
        yield Hit(REPEATED_NGRAMS, excerpt(ngram), share, limits.ngram_share)


def _lengths(text: str, limits: QualityLimits) -> Iterator[Hit]:
    sentence = longest_sentence(text)
    if len(sentence) > limits.sentence_characters:
        yield Hit(SENTENCE_LENGTH, excerpt(sentence), len(sentence), limits.sentence_characters)
    start, length = longest_zeros(text)
    if length > limits.zeros:
        yield Hit(ZEROS, excerpt(text[max(0, start - 40) :]), length, limits.zeros)


def excerpt(text: str) -> str:
    """The text on one line, cut."""
    # Cut before blanks are joined: an answer may be megabytes long.
    line = " ".join(text[: 2 * _EXCERPT].split())
    return line if len(line) <= _EXCERPT and len(text) <= 2 * _EXCERPT else f"{line[:_EXCERPT]}..."


def repeated_lines(text: str) -> tuple[float, int, str]:
    r"""Share and number of lines that repeat an earlier line, and the most frequent line.

    Lines count without blanks at both ends, and only if they hold a letter or a digit: the braces of a program and
    the rules of a table are no repetition. "a\nb\na\n}\n}\na" has the four lines a, b, a, a; two of them repeat the
    first, so the share is 2 / 4.
    """
    lines = Counter(line.strip() for line in text.splitlines() if _LETTER_OR_DIGIT.search(line))
    if not lines:
        return 0.0, 0, ""
    repeats = lines.total() - len(lines)
    return repeats / lines.total(), repeats, lines.most_common(1)[0][0]


def repeated_ngrams(text: str) -> tuple[float, str]:
    """Share of the 10-grams that repeat an earlier 10-gram, and the most frequent one.

    A 10-gram is ten units in a row; a unit is a word, or one character of Chinese or Japanese. The 13 words "a b a b a
    b a b a b a b a" hold four 10-grams: two that begin with a, two that begin with b. Two repeat an earlier one, so the
    share is 2 / 4.
    """
    units = _UNIT.findall(text)
    count = len(units) - _NGRAM + 1
    if count < 2:
        return 0.0, ""
    ngrams = Counter(tuple(units[start : start + _NGRAM]) for start in range(count))
    return (count - len(ngrams)) / count, " ".join(ngrams.most_common(1)[0][0])


def longest_sentence(text: str) -> str:
    """The longest stretch without a full stop, question or exclamation mark, or line break.

    "One. Two three! 3.14 is a number" has the sentences of 4, 10 and 16 characters: a point needs a blank behind it.
    """
    return max(_SENTENCE_END.split(text), key=len)


def longest_zeros(text: str) -> tuple[int, int]:
    """Start and length of the longest run of the digit 0; "100 and 5000" has it at 9, of length 3."""
    longest = max(_ZEROS.finditer(text), key=lambda run: run.end() - run.start(), default=None)
    return (0, 0) if longest is None else (longest.start(), longest.end() - longest.start())


def row_key(turns: Iterable[Turn], media: Iterable[str]) -> bytes:
    """16 bytes that are equal for rows of equal questions, answers and media, and for no others in practice.

    Media count by their place: a copy of a picture under another name is another picture.

    Args:
        turns: of the row.
        media: absolute places of its pictures or its video.
    """
    return _hash([*media, "", *(part for turn in turns for part in (turn.role, turn.text))], 16)


def text_key(parts: Iterable[str]) -> int:
    """A 64-bit number for counting equal texts."""
    return int.from_bytes(_hash(parts, 8), "little")


def _hash(parts: Iterable[str], size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = part.encode()
        # With its length in front, so that no two lists of parts run together to the same bytes.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def duplicates(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows whose key an earlier row has, ascending, and that first row of each.

    Keys of the rows 0 to 4 that are a, b, a, c, a give the later rows 2, 4 with the first rows 0, 0.

    Args:
        keys: `[n, 2]`, the 16 bytes of `row_key` of each row.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    same = np.zeros(len(keys), dtype=bool)
    same[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    # Sorting is stable, so the first row of a run of equal keys is the earliest.
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(keys))))]
    later = order[same]
    ascending = np.argsort(later)
    return later[ascending], first[same][ascending]


def most_frequent(keys: NDArray[np.uint64]) -> tuple[int, int]:
    """How often the most frequent key stands there, and where first; (0, 0) of nothing."""
    if not len(keys):
        return 0, 0
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    best = int(np.argmax(counts))
    return int(counts[best]), int(first[best])
