"""Boxes in texts, as `<box>[[x1, y1, x2, y2]]</box>`, and whether they are the expected ones. RefCOCO.

Source: the original's `evaluate_grounding.py`.
"""

import re
from collections.abc import Sequence

from ivl_lightning.metrics.answer_score import AnswerScore
from ivl_lightning.metrics.text_scores import exact

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the picture's width and height."""

LEAST_IOU = 0.5

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_THOUSANDTHS = 1000
_LARGEST_SUM = 4


class BoxAccuracy(AnswerScore):
    """Share of expected boxes that are met; see `box_accuracy`."""

    def _against(self, answer: str, truth: str, question: str) -> float:
        return box_accuracy(answer, truth)


def box_accuracy(answer: str, truth: str) -> float:
    """1 where the answer's box has an IoU of at least 0.5 with the expected one; 0 without a box.

    Where one box is expected, the first of the answer counts: the official score. Where several are, boxes of both
    sides are paired, the largest IoU first, and the score is pairs of at least 0.5 / boxes of the side that has more. A
    truth without a box is compared by `exact`.
    """
    wanted, given = boxes_of(truth), boxes_of(answer)
    if not wanted:
        return exact(answer, truth)
    if len(wanted) == 1:
        given = given[:1]
    return _pairs(given, wanted) / max(len(given), len(wanted))


def boxes_of(text: str) -> list[Box]:
    """Boxes in a text, in order: four numbers in brackets.

    They are thousandths of the picture, or shares where they add up to less than four (the official rule).
    """
    boxes = [(float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in _BOX.findall(text)]
    return [_as_shares(box) for box in boxes]


def iou(one: Box, other: Box) -> float:
    """Intersection over union; 0 where both are empty."""
    common = (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    inside = _area(common)
    union = _area(one) + _area(other) - inside
    return inside / union if union else 0.0


def _as_shares(box: Box) -> Box:
    if sum(box) < _LARGEST_SUM:
        return box
    left, top, right, bottom = (value / _THOUSANDTHS for value in box)
    return left, top, right, bottom


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _pairs(given: Sequence[Box], wanted: Sequence[Box]) -> int:
    """Pairs of boxes that fit, each box in one pair at most."""
    rated = sorted(
        ((iou(one, other), i, j) for i, one in enumerate(given) for j, other in enumerate(wanted)), reverse=True
    )
    taken_given: set[int] = set()
    taken_wanted: set[int] = set()
    for fit, i, j in rated:
        if fit >= LEAST_IOU and i not in taken_given and j not in taken_wanted:
            taken_given.add(i)
            taken_wanted.add(j)
    return len(taken_given)
