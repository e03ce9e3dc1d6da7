"""VQA score: how many of ten people gave the same answer. VQA v2, OK-VQA, TextVQA, VizWiz.

Source: the EvalAI evaluation (`EvalAIAnswerProcessor`, `TextVQAAccuracyEvaluator`), as the original has it.
"""

import re
from collections.abc import Sequence

from ivl_lightning.metrics.answer_score import AnswerScore

VOTES = 10
"""So many truths or more are votes of people; fewer are answers of which each is right."""

_ENOUGH = 3
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBERS)}}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A word with one apostrophe left out, "dont" or "couldn'tve", is the word.
_CONTRACTIONS = {
    word[: found.start()] + word[found.end() :]: word
    for word in _CONTRACTED.split()
    for found in re.finditer("'", word)
}


class VQAScore(AnswerScore):
    """Mean VQA score; see `vqa_score`."""

    def score(self, answer: str, truths: Sequence[str], question: str = "") -> float:
        """See `vqa_score`."""
        return vqa_score(answer, truths)


def vqa_score(answer: str, truths: Sequence[str]) -> float:
    """Score of an answer, 0 to 1, all texts brought to the official form first.

    Of ten people's answers each in turn is left out, and the answer scores min(same among the other nine / 3, 1); the
    mean of that is 0.3, 0.6, 0.9 and 1 where one, two, three and more people gave it. With fewer than ten truths it is
    1 where the answer is one of them.

    Raises:
        ValueError: there is no truth.
    """
    if not truths:
        raise ValueError("an answer cannot be scored without a truth")
    given, count = normalise_answer(answer), len(truths)
    same = sum(normalise_answer(truth) == given for truth in truths)
    if count < VOTES:
        return float(same > 0)
    others = same * min((same - 1) / _ENOUGH, 1.0) + (count - same) * min(same / _ENOUGH, 1.0)
    return others / count


def normalise_answer(text: str) -> str:
    """An answer in the form in which the official evaluation compares it.

    In lower case, without articles, commas, question marks and full stops (but for those before a digit), number words
    up to ten as digits, contractions with their apostrophe. Other punctuation goes where one of its kind has a blank
    beside it, and becomes a blank elsewhere: "black/white" is "black white". "man's" is "man 's".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (_DIGITS.get(word, word) for word in _without_punctuation(text).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    result = text
    for sign in _PUNCTUATION:
        beside_blank = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if beside_blank else " ")
    return _FULL_STOP.sub("", result)
