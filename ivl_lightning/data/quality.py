"""Quality of a row's text by rules: the heuristics of the InternVL 2.5 paper that need no language model.

A hit is a reason to look, not a verdict: a poem or a program may repeat itself rightly. The rules look at prose: the
rules of a table, the keywords of a program, numbers, formulas and boxes are no hit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unicodedata import category

from ivl_lightning.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ivl_lightning.structures import Turn

REPEATED_LINES, REPEATED_NGRAMS, ZEROS = "repeated_lines", "repeated_ngrams", "zeros"
SENTENCE_LENGTH, ANSWER_LENGTH, DUPLICATE = "sentence_length", "answer_length", "duplicate"
RULES = (REPEATED_LINES, REPEATED_NGRAMS, SENTENCE_LENGTH, ANSWER_LENGTH, ZEROS, DUPLICATE)

_EXCERPT = 200
_NGRAM = 10
# Kana and Han: written without blanks, so each character counts as a word. Hangul has blanks.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CHARACTER = re.compile(rf"[{_CJK}]")
_UNIT = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_FEWEST_WORDS, _FEWEST_CHARACTERS = 4, 10
# Marks of European, Arabic, Urdu and Indic scripts need a blank behind them, East Asian and Indic full stops do not.
_SENTENCE_MARK = r"""(?<=[.!?।؟۔])["'”’)\]]*\s+|[。！？；…।؟۔]+"""
_SENTENCE_END = re.compile(rf"(?:{_SENTENCE_MARK}|\n+)")
_MARK = re.compile(_SENTENCE_MARK)
_PROSE = 0.8
# The zeros of a hexadecimal or binary number are none of the text's.
_ZEROS = re.compile(r"0[xXbBoO][0-9a-fA-F]+|(?P<zeros>0+)")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """What is still taken for normal.

    Attributes:
        line_share: share of a text's lines that repeat an earlier line.
        ngram_share: share of a text's 10-grams that repeat an earlier one.
        repeats: fewer repeated lines or 10-grams are never a hit.
        sentence_characters: length of a sentence.
        answer_characters: length of an answer; an empty one is a hit too.
        zeros: length of a run of the digit 0.
    """

    line_share: float = 0.4
    ngram_share: float = 0.4
    repeats: int = 3
    sentence_characters: int = 1000
    answer_characters: int = 20_000
    zeros: int = 32


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
    for rule, measure, limit in (
        (REPEATED_LINES, repeated_lines, limits.line_share),
        (REPEATED_NGRAMS, repeated_ngrams, limits.ngram_share),
    ):
        share, count, place = measure(text)
        if share > limit and count >= limits.repeats:
            yield Hit(rule, excerpt(place), share, limit)


def repeats_itself(text: str, limits: QualityLimits | None = None) -> bool:
    """Whether a text breaks the rule of repeated 10-grams: an answer that goes round in circles."""
    return any(hit.rule == REPEATED_NGRAMS for hit in _repetition(text, limits or QualityLimits()))


def _lengths(text: str, limits: QualityLimits) -> Iterator[Hit]:
    sentence = longest_sentence(text, above=limits.sentence_characters)
    if sentence:
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
    r"""Share and number of lines that repeat an earlier line, and the most frequent of them.

    Lines count without blanks at both ends, and only if they hold a letter or a digit. Only a line of four words, or of
    ten characters of Chinese or Japanese, can be a repeat: `\hline`, `<td>`, `end` and "Yes" may stand there as often
    as they like. Of the four lines "it is a cat", "b", "it is a cat", "b" one is a repeat: 1 / 4.
    """
    lines = Counter(line.strip() for line in text.splitlines() if _LETTER_OR_DIGIT.search(line))
    repeats = {line: count - 1 for line, count in lines.items() if count > 1 and _is_wordy(line)}
    return _most_repeated(repeats, lines.total())


def repeated_ngrams(text: str) -> tuple[float, int, str]:
    """Share and number of the 10-grams that repeat an earlier 10-gram, and the most frequent of them.

    A 10-gram is ten units in a row; a unit is a word, or one character of Chinese or Japanese. The 13 words "a b a b a
    b a b a b a b a" hold four 10-grams: two that begin with a, two that begin with b. Two repeat an earlier one, so the
    share is 2 / 4. As with lines, only a 10-gram with four words or ten such characters can be a repeat: the rule
    between the rows of a table, or a matrix of zeros and ones, is none.
    """
    units = _UNIT.findall(text)
    count = len(units) - _NGRAM + 1
    if count < 2:
        return 0.0, 0, ""
    ngrams = Counter(tuple(units[start : start + _NGRAM]) for start in range(count))
    repeats = {ngram: times - 1 for ngram, times in ngrams.items() if times > 1}
    wordy = {words: times for ngram, times in repeats.items() if _is_wordy(words := " ".join(ngram))}
    return _most_repeated(wordy, count)


def _is_wordy(text: str) -> bool:
    """Whether a stretch of text has four words (a letter each), or ten characters of Chinese or Japanese."""
    if len(_CHARACTER.findall(text)) >= _FEWEST_CHARACTERS:
        return True
    words = _CHARACTER.sub(" ", text).split()
    return sum(_LETTER.search(word) is not None for word in words) >= _FEWEST_WORDS


def _most_repeated(repeats: dict[str, int], total: int) -> tuple[float, int, str]:
    if not repeats:
        return 0.0, 0, ""
    count = sum(repeats.values())
    return count / total, count, max(repeats, key=repeats.__getitem__)


def longest_sentence(text: str, above: int = 0) -> str:
    """The longest stretch of prose between two ends of a sentence, "" if none is longer than `above` characters.

    A sentence ends at a line break, at a full stop, question or exclamation mark of any script, at `；` and `…`; behind
    a European mark a closing quote may follow, and a blank must: "One. Two three! The number is called 3.14" has the
    sentences of 4, 10 and 25 characters. Prose is a stretch with at least 80 % letters and blanks. A text that uses no
    mark at all has no sentences to measure: words read off a picture, a list, Thai.

    Args:
        text: of a turn.
        above: characters; shorter sentences are passed over.
    """
    if len(text) <= above or not _MARK.search(f"{text}\n"):
        return ""
    long = (sentence for sentence in _SENTENCE_END.split(text) if len(sentence) > above)
    return max(filter(_is_prose, long), key=len, default="")


def _is_prose(text: str) -> bool:
    # Vowel signs of Indic scripts are marks, which `isalpha` does not count; they stand for letters.
    letters = sum(character.isalpha() or character.isspace() or category(character)[0] == "M" for character in text)
    return letters >= _PROSE * len(text)


def longest_zeros(text: str) -> tuple[int, int]:
    """Start and length of the longest run of the digit 0; "100 and 5000" has it at 9, of length 3.

    The zeros of "0x0000" are no run.
    """
    runs = (match.span("zeros") for match in _ZEROS.finditer(text) if match["zeros"])
    start, stop = max(runs, key=lambda run: run[1] - run[0], default=(0, 0))
    return start, stop - start
