"""Scores over several answers, by hand."""

from typing import get_args

import pytest

from ivl_lightning.config.schema import Metric
from ivl_lightning.metrics.box_accuracy import box_accuracy, boxes_of, iou
from ivl_lightning.metrics.exact_match import ExactMatch
from ivl_lightning.metrics.scoring import METRICS, score
from ivl_lightning.metrics.text_metrics import ANLS, MultipleChoice, NumberMatch, RelaxedAccuracy
from ivl_lightning.metrics.vqa_score import VQAScore, normalise_answer, vqa_score


def test_exact_match_by_hand():
    """Three of four: equal, equal but for blanks at the ends, and equal; 'Red' is not 'red'."""
    score = ExactMatch()
    score.update(["3", " a dog \n"], ["3", "a dog"])
    score.update(["Red", ""], ["red", ""])
    assert score.compute().item() == pytest.approx(3 / 4)


def test_case_can_be_ignored():
    score = ExactMatch(ignore_case=True)
    score.update(["Red "], ["red"])
    assert score.compute().item() == 1.0


def test_nothing_counted_is_zero_and_reset_forgets():
    score = ExactMatch()
    assert score.compute().item() == 0.0
    score.update(["a"], ["a"])
    score.reset()
    assert score.compute().item() == 0.0


def test_answers_and_expected_must_pair():
    with pytest.raises(ValueError, match="zip"):
        ExactMatch().update(["a"], [])


@pytest.mark.parametrize("metric", [ExactMatch, ANLS, VQAScore])
def test_an_answer_needs_a_truth(metric):
    with pytest.raises(ValueError, match=r"without a truth|empty"):
        metric().update(["a"], [[]])


def test_the_best_of_several_truths_counts():
    """ "kiten": 1 edit of 6 characters from "kitten", 5 / 6; 4 of 7 from "sitting", which is too far. Mean with 0."""
    found = ANLS()
    found.update(["kiten", "dog"], [["sitting", "kitten"], ["horse"]])
    assert found.compute().item() == pytest.approx((5 / 6 + 0) / 2)


def test_each_score_is_its_own():
    """The same answer "B" or "104" is right for one score and wrong for another."""
    choice, relaxed, number = MultipleChoice(), RelaxedAccuracy(), NumberMatch()
    choice.update(["B", "B"], ["a dog", "a dog"], ["Which?\nA. a cat\nB. a dog", "Which?\nA. a dog\nB. a cat"])
    relaxed.update(["104", "106"], ["100", "100"])
    number.update(["104", "100.0005"], ["100", "100"])
    assert [metric.compute().item() for metric in (choice, relaxed, number)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_votes_of_ten_people(same, expected):
    """One in turn is left out of ten. Of m that say the same, m times m - 1 are left, else m; min(left / 3, 1).

    m = 1: (1 x 0 + 9 x 1/3) / 10; m = 2: (2 x 1/3 + 8 x 2/3) / 10; m = 3: (3 x 2/3 + 7 x 1) / 10; m = 4: all 1.
    """
    truths = ["a cat"] * same + [f"dog {number}" for number in range(10 - same)]
    assert vqa_score("The cat.", truths) == pytest.approx(expected)


def test_fewer_truths_are_no_votes():
    assert vqa_score("two", ["2"]) == 1.0
    assert vqa_score("yes", ["no", "Yes!", "maybe"]) == 1.0
    assert vqa_score("yes", ["no"] * 9) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat and a dog.", "cat and dog"),
        ("one, two, ten", "1 2 10"),  # commas go before anything else
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),  # a full stop before a digit stays
        ("3.", "3"),
        ("u.s.", "us"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("black/white", "black white"),  # no blank beside the sign
        ("black / white", "black white"),  # a blank beside it: it goes, and blanks are joined
        ("well-known - x", "wellknown x"),  # one dash has blanks beside it, so all go: the official rule
        ("man's", "man 's"),
        ("what?\nnow", "what now"),
        ("", ""),
    ],
)
def test_the_official_form_of_an_answer(text, expected):
    assert normalise_answer(text) == expected


def test_boxes_in_a_text():
    """Thousandths, or shares where they add up to less than 4; text without four numbers in brackets is no box."""
    text = "<ref>a dog</ref><box>[[100, 200, 300, 400], [0,0,1000,1000.0]]</box> and [0.1, 0.2, 0.3, 0.4]"
    assert boxes_of(text) == [(0.1, 0.2, 0.3, 0.4), (0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.3, 0.4)]
    assert boxes_of("[1, 2, 3] [a, b, c, d] 1, 2, 3, 4") == []


def test_iou():
    """Two squares of side 0.4 that share half: 0.08 / (0.16 + 0.16 - 0.08) = 1 / 3. Apart, empty, turned over: 0."""
    square = (0.0, 0.0, 0.4, 0.4)
    assert iou(square, (0.2, 0.0, 0.6, 0.4)) == pytest.approx(1 / 3)
    assert iou(square, square) == pytest.approx(1.0)
    assert iou(square, (0.5, 0.5, 0.9, 0.9)) == 0.0
    assert iou((0.1, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1)) == 0.0
    assert iou(square, (0.4, 0.4, 0.0, 0.0)) == 0.0


def box(*numbers: int) -> str:
    return f"<box>[{list(numbers)}]</box>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (box(0, 0, 100, 100), 1.0),
        ("It is at [0, 0, 100, 100].", 1.0),
        (box(0, 0, 100, 51), 1.0),  # 5100 / 10000
        (box(0, 0, 100, 49), 0.0),
        (box(0, 0, 200, 100), 1.0),  # 10000 / 20000 = 0.5 is enough
        (box(500, 500, 600, 600) + box(0, 0, 100, 100), 0.0),  # the first counts
        (box(0, 0, 100, 100) + box(500, 500, 600, 600), 1.0),
        ("there", 0.0),
        ("", 0.0),
    ],
)
def test_one_box(answer, expected):
    assert box_accuracy(answer, box(0, 0, 100, 100)) == expected


def test_several_boxes():
    """Two expected. One of two met, 1 / 2; both and one more, 2 / 3; one given twice is one pair, 1 / 2."""
    first, second, third = box(0, 0, 100, 100), box(200, 0, 300, 100), box(400, 0, 500, 100)
    truth = first + second
    assert box_accuracy(second + first, truth) == 1.0
    assert box_accuracy(second, truth) == 0.5
    assert box_accuracy(first + second + third, truth) == pytest.approx(2 / 3)
    assert box_accuracy(first + first, truth) == 0.5
    assert box_accuracy("none", truth) == 0.0
    assert box_accuracy("Not there", "not there") == 1.0  # a truth without a box


def test_every_named_metric_can_be_made():
    """And gives 1 for the right answer, 0 for another one."""
    assert tuple(METRICS) == get_args(Metric)
    for metric in METRICS:
        assert score(metric, "7", ["6", "7"]) == 1.0
        assert score(metric, "9", ["6", "7"]) == 0.0
    assert score("multiple_choice", "A", ["a cat"], "Which?\nA. a cat\nB. a dog") == 1.0
