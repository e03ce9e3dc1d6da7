"""How questions are asked, what responses say, and which of them make a pair; each worked by hand."""

import numpy as np
import pytest

from ivl_lightning.curation.answers import final_answer, score
from ivl_lightning.curation.dropout import first_part, question_without_images
from ivl_lightning.curation.pairs import Judged, Pair, right_by_wrong, unusable
from ivl_lightning.curation.prompts import ask

STEPS = "There are two.\nAnd two more.\nFinal answer: "


@pytest.mark.parametrize(
    ("question", "start", "end"),
    [
        ("<image>\nHow many?", "<image>\nWork out", "Question: How many?"),
        ("How many in <image> ?", "<image>\nWork out", "Question: How many in  ?"),
        ("<video>\nHow many?", "<video>\nWork out", "Question: How many?"),
        ("<image>\n<image>\nCompare.", "Work out", "Question: <image>\n<image>\nCompare."),
        ("How many?\nanswer the question using a single word or phrase.\n", "Work out", "Question: How many?"),
        (
            "<image>\nA?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
            "<image>\nWork out",
            "Question: A?",
        ),
    ],
)
def test_steps_are_asked_for(question, start, end):
    asked = ask(question, "cot_en")
    assert asked.startswith(start)
    assert asked.endswith(end)
    assert asked.count("Final answer: ..") == 1


def test_steps_are_asked_for_in_chinese():
    asked = ask("图中有几个？请直接回答选项字母。", "cot_zh")
    assert asked.endswith("问题: 图中有几个？")
    assert "答案: .." in asked


def test_plain_questions_stay_as_they_are():
    question = "What? <image>\nAnswer the question using a single word or phrase."
    assert ask(question, "plain") == question


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (STEPS + "4", "4"),
        (STEPS + "4.", "4"),
        (STEPS + "a red car\n", "a red car"),
        ("Two.\nTwo.\n**Final Answer:** **4**", "4"),
        (STEPS + "4\n\nFinal answer: 4", "4"),  # two triggers
        (STEPS + "5\nWait.\nFinal answer: 4", "4"),  # the last one counts
        (STEPS + "4\nFinal answer: 4\nFinal answer: 4", None),  # three
        ("There are four.\nSo 4.\n", None),  # none
        ("Two and two. Final answer: 4", None),  # no newline
        ("Two and two.\nFinal answer: 4", None),  # one newline
        ("\n\nFinal answer: 4", None),  # no rationale
        (STEPS + "4\nor 5", None),  # two lines
        (STEPS, None),
        ("", None),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response, "cot_en") == answer


def test_final_answer_in_chinese():
    assert final_answer("一加一。\n等于二。\n答案：2。", "cot_zh") == "2"
    assert final_answer(STEPS + "4", "cot_zh") is None


def test_a_plain_response_is_its_answer():
    assert final_answer(" Red. ", "plain") == "Red"
    assert final_answer(" ", "plain") is None


def test_judges():
    assert score("Red", "red.", "", "exact") == 1
    assert score(None, "", "", "exact") == 0  # unclear is wrong, whatever is expected
    assert score("95", "100", "", "relaxed") == 1
    assert score("2013", "2020", "", "relaxed") == 0
    assert score("helo", "hello", "", "anls") == pytest.approx(0.8)
    assert score("a dog", "B", "Which?\nA. a cat\nB. a dog", "choice") == 1
    assert score("3.1404", "3.14", "", "number") == 1


def judged(text: str, *, right: bool, answer: str | None = "") -> Judged:
    return Judged(text, text if answer == "" else answer, float(right))


def pairs_of(right, wrong, most=15, seed=0):
    pairs, skipped = right_by_wrong(right, wrong, most=most, rng=np.random.default_rng(seed))
    assert all(isinstance(pair, Pair) for pair in pairs)
    return [(pair.chosen.text, pair.rejected.text) for pair in pairs], dict(skipped)


def test_every_right_response_meets_every_wrong_one_once():
    right = [judged("one", right=True), judged("One", right=True), judged("one", right=True)]
    wrong = [judged("two", right=False), judged("three", right=False), judged("two", right=False)]
    pairs, skipped = pairs_of(right, wrong)
    assert pairs == [("one", "two"), ("one", "three"), ("One", "two"), ("One", "three")]
    assert skipped == {"repeated": 2}


def test_a_right_answer_inside_the_wrong_one_is_skipped():
    right = [judged("red", right=True)]
    wrong = [
        judged("Dark RED", right=False),
        judged("blue", right=False),
        judged("blue\nred?\n\n", right=False, answer=None),  # unclear: its last line counts
        judged("red?\nblue", right=False, answer=None),
    ]
    assert pairs_of(right, wrong) == ([("red", "blue"), ("red", "red?\nblue")], {"entailed": 2})


def test_responses_that_cannot_be_trained_on_make_no_pair():
    wrong = [judged(" ", right=False, answer=None), judged("an <image>", right=False), judged("blue", right=False)]
    assert pairs_of([judged("red", right=True)], wrong) == ([("red", "blue")], {"empty": 1, "reserved_token": 1})
    assert unusable("</img>") == "reserved_token"


def test_at_most_so_many_pairs_drawn_by_the_generator():
    right = [judged(letter, right=True) for letter in "abcd"]
    wrong = [judged(letter, right=False) for letter in "wxyz"]
    everything, _ = pairs_of(right, wrong, most=16)
    draws = {seed: pairs_of(right, wrong, most=3, seed=seed) for seed in range(5)}
    assert draws[0] == pairs_of(right, wrong, most=3, seed=0)
    assert len({tuple(pairs) for pairs, _ in draws.values()}) > 1
    for pairs, skipped in draws.values():
        assert skipped == {"over_max_pairs": 13}
        assert pairs == [pair for pair in everything if pair in pairs]
        assert len(pairs) == 3


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one two three four", "one two"),
        ("one  two\nthree four five", "one  two"),
        ("red", ""),
        ("一二三四五", "一二"),
        ("カタカナ", "カタ"),
        ("", ""),
    ],
)
def test_the_first_half_of_an_answer(text, first):
    assert first_part(text, 0.5) == first
    assert text.startswith(first)


def test_images_and_their_labels_leave_the_question():
    assert question_without_images("<image>\nWhat is it?") == "What is it?"
    assert question_without_images("Image-1: <image>\nImage-2: <image>\nCompare.") == "Compare."
    assert question_without_images("Picture 1：<image> or Picture 2：<image>?") == "or ?"
    assert question_without_images("<video>\nWho?") == "Who?"
    assert question_without_images("<image>") == ""
