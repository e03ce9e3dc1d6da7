"""DropoutNTP: an answer given with the image, and the same answer finished without it.

Source: InternVL2.5-MPO (MMPR), `reasoning_data_pipeline` of the original: the first half of the words is kept, and the
model continues it blindly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ivl_lightning.curation.answers import final_answer
from ivl_lightning.curation.pairs import Judged, Pair, unusable
from ivl_lightning.curation.questions import Question
from ivl_lightning.curation.responses import Outcome
from ivl_lightning.curation.sampling import Response, Sampler
from ivl_lightning.structures import RowError

# Characters of scripts that put no blanks between words, and their punctuation; or a word between blanks.
_UNBLANKED = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_WORD = re.compile(rf"[{_UNBLANKED}]|[^\s{_UNBLANKED}]+")
_PLACEHOLDER = re.compile(
    rf"(?:\w+[-_ ]?\d+[ \t]*[:：][ \t]*)?(?:{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)})\n?"
)


def answer_twice(sampler: Sampler, questions: Sequence[Question], config: PreferencesConfig) -> list[Outcome]:
    """For each question the chosen answer and, unless an obstacle stands in the way, the blindly finished one."""
    outcomes = _chosen(sampler, questions, config)
    places = [
        place
        for place, (question, outcome) in enumerate(zip(questions, outcomes, strict=True))
        if not isinstance(outcome, RowError) and _obstacle(question, outcome[0], config) is None
    ]
    chosen = [outcome for place in places if not isinstance(outcome := outcomes[place], RowError)]
    blind = sampler.answer(
        [questions[place].blind_prompt(question_without_images(questions[place].text)) for place in places],
        samples=1,
        starts=[first_part(outcome[0].text, config.start_ratio) for outcome in chosen],
    )
    for place, outcome, continued in zip(places, chosen, blind, strict=True):
        outcomes[place] = continued if isinstance(continued, RowError) else (*outcome, *continued)
    return outcomes


def seen_by_blind(
    question: Question, responses: Sequence[Response], config: PreferencesConfig
) -> tuple[list[Pair], Counter[str]]:
    """The pair of a question, if it has one.

    Args:
        question: that was answered.
        responses: as `answer_twice` gives them.
        config: the settings of the command.

    Returns:
        At most one pair, and why there is none: the chosen answer is `empty`, `unfinished`, holds a `reserved_token`
        or has nothing in its first half (`empty_half`); the question is nothing but its image (`no_question`); what
        was continued holds a `reserved_token`, is the chosen answer (`same`), or ended at once (`nothing_added`).
    """
    obstacle = _obstacle(question, responses[0], config)
    if obstacle is None:
        chosen, rejected = responses
        obstacle = _fault(chosen.text, rejected.text, config)
    if obstacle is not None:
        return [], Counter([obstacle])
    style = config.prompt_style
    pair = Pair(*(Judged(response.text, final_answer(response.text, style), None) for response in responses))
    return [pair], Counter()


def first_part(text: str, share: float) -> str:
    """The text up to the end of this share of its words, rounded down; without blanks, of its characters."""
    words = list(_WORD.finditer(text))
    kept = int(len(words) * share)
    return text[: words[kept - 1].end()] if kept else ""


def question_without_images(question: str) -> str:
    """The question without placeholders and the labels before them ("Image-1: ")."""
    return _PLACEHOLDER.sub("", question).strip()


def _chosen(sampler: Sampler, questions: Sequence[Question], config: PreferencesConfig) -> list[Outcome]:
    if config.answers == "data":
        return [(Response(question.truth, finished=True),) for question in questions]
    return sampler.answer([question.prompt for question in questions], samples=1)


def _obstacle(question: Question, chosen: Response, config: PreferencesConfig) -> str | None:
    """Why an answer is not continued."""
    if reason := unusable(chosen.text):
        return reason
    if not chosen.finished:
        return "unfinished"
    if not question_without_images(question.text):
        return "no_question"
    return None if first_part(chosen.text, config.start_ratio) else "empty_half"


def _fault(chosen: str, rejected: str, config: PreferencesConfig) -> str | None:
    """Why a continued answer makes no pair."""
    if rejected == chosen:
        return "same"
    return "nothing_added" if rejected == first_part(chosen, config.start_ratio) else unusable(rejected)
