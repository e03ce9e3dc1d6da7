"""How a question is asked: as it stands, or with the demand for steps and a final answer."""

from __future__ import annotations

import re

from ivl_lightning.config.preferences import PromptStyle
from ivl_lightning.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

_STEPS: dict[PromptStyle, str] = {
    "cot_en": (
        "Work out the answer to the question below. First write down what you are given, then draw one conclusion "
        "after the other, each on a line of its own, and leave no step out. If the question lists options, the answer "
        "is the letter of one of them. Close with one last line of this form:\nFinal answer: ..\n\nQuestion: "
    ),
    "cot_zh": (
        "请解答下面的问题。先写出已知的信息，再逐步推出结论，每一步单独成行，不要跳过任何一步。"
        "如果问题给出了选项，答案就是其中一个选项的字母。最后单独用一行写出答案，格式如下：\n答案: ..\n\n问题: "
    ),
}
_SHORT_ANSWER = (
    "Answer the question using a single word or phrase.",
    "Answer the question using a single word.",
    "Answer the question with a single word or phrase.",
    "Answer the question with a single word.",
    "Answer with a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Please answer directly with the letter of the correct option.",
    "Only give the best option.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    "请直接回答选项字母。",
    "请用一个词或短语回答问题。",
    "请用单个词或短语回答问题。",
)
"""Demands for a short answer, at the end of questions of the public data sets: they contradict the demand for steps."""
_SHORT_ANSWER_AT_END = re.compile(rf"\s*(?:{'|'.join(map(re.escape, _SHORT_ANSWER))})\s*\Z", re.IGNORECASE)
_PLACEHOLDER = re.compile(rf"({re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)})\n?")


def ask(question: str, style: PromptStyle) -> str:
    """The question as it is put to the model.

    For the styles that ask for steps the demand for a short answer is taken off, and a single placeholder moves to the
    front, before the instructions. Source of both: the original's `reasoning_data_pipeline`; the wording is our own.

    Args:
        question: as in the data, with its placeholders.
        style: `plain` changes nothing.
    """
    if style == "plain":
        return question
    placeholders = _PLACEHOLDER.findall(question)
    front = ""
    if len(placeholders) == 1:
        question, front = _PLACEHOLDER.sub("", question), f"{placeholders[0]}\n"
    return front + _STEPS[style] + _without_short_answer(question).strip()


def _without_short_answer(question: str) -> str:
    # Some questions make two such demands.
    while (shorter := _SHORT_ANSWER_AT_END.sub("", question)) != question:
        question = shorter
    return question
