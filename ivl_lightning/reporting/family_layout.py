"""Where the boxes of a family tree stand and which way its arrows go: parents above, short ways, few crossings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from ivl_lightning.reporting.placing import apart

_SWEEPS = 6
_GAP = 0.14
_LANE = 0.25
"""Width of the way of an arrow that passes between boxes."""

Edge = tuple[int, int]
Point = tuple[float, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """A drawing plan in widths of a box and rows, from the top left corner.

    Attributes:
        boxes: center and row of each box.
        routes: for each arrow the points from parent to child, one for each row.
        width: of the plan.
        rows: how many there are.
    """

    boxes: list[Point]
    routes: list[list[Point]]
    width: float
    rows: int


def layout(count: int, edges: Sequence[Edge]) -> Layout:
    """Plan boxes and arrows.

    Args:
        count: of boxes.
        edges: parent and child; a parent's number is smaller than its child's.
    """
    rows = rows_of(count, edges)
    ways: list[list[int]] = []
    # An arrow across several rows needs a free lane in each: a narrow box that is not drawn.
    for parent, child in edges:
        lanes = list(range(len(rows), len(rows) + rows[child] - rows[parent] - 1))
        rows += [rows[parent] + 1 + place for place in range(len(lanes))]
        ways.append([parent, *lanes, child])
    steps = [step for way in ways for step in pairwise(way)]
    widths = [1.0 if number < count else _LANE for number in range(len(rows))]
    centers = _centers(_ordered(rows, steps), steps, widths)
    left = min(center - width / 2 for center, width in zip(centers, widths, strict=True))
    right = max(center + width / 2 for center, width in zip(centers, widths, strict=True))
    points = [(center - left, row) for center, row in zip(centers, rows, strict=True)]
    return Layout(points[:count], [[points[number] for number in way] for way in ways], right - left, max(rows) + 1)


def rows_of(count: int, edges: Sequence[Edge]) -> list[int]:
    """A row for each box, below its parents': what has children stands right above them, the youngest right below."""
    parents, children = _neighbors(count, edges)
    depth = [0] * count
    for number in range(count):
        depth[number] = max((depth[parent] + 1 for parent in parents[number]), default=0)
    late = [max(depth)] * count
    for number in reversed(range(count)):
        late[number] = min((late[child] - 1 for child in children[number]), default=late[number])
    return [
        late[number] if children[number] else max((late[parent] + 1 for parent in parents[number]), default=0)
        for number in range(count)
    ]


def _ordered(rows: Sequence[int], edges: Sequence[Edge]) -> list[list[int]]:
    """The boxes of each row from left to right, each near the mean place of those that it is joined to."""
    order = [[number for number in range(len(rows)) if rows[number] == row] for row in range(max(rows) + 1)]
    parents, children = _neighbors(len(rows), edges)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        joined = parents if down else children
        for row in order if down else order[::-1]:
            shares = {number: place / len(one) for one in order for place, number in enumerate(one, start=1)}
            means = {number: fmean([shares[other] for other in joined[number]] or [shares[number]]) for number in row}
            row.sort(key=means.__getitem__)
    return order


def _centers(order: Sequence[Sequence[int]], edges: Sequence[Edge], widths: Sequence[float]) -> list[float]:
    """The center of each box: in its row's order, without overlap, close below its parents and above its children."""
    parents, children = _neighbors(len(widths), edges)
    centers = [0.0] * len(widths)
    for row in order:
        for place, number in enumerate(row):
            centers[number] = place - (len(row) - 1) / 2
    for sweep in range(2 * _SWEEPS + 1):
        down = sweep % 2 == 0
        joined = parents if down else children
        for row in order if down else order[::-1]:
            wished = [fmean([centers[other] for other in joined[number]] or [centers[number]]) for number in row]
            gaps = [(widths[one] + widths[other]) / 2 + _GAP for one, other in pairwise(row)]
            for number, center in zip(row, apart(wished, gaps), strict=True):
                centers[number] = center
    return centers


def _neighbors(count: int, edges: Sequence[Edge]) -> tuple[list[list[int]], list[list[int]]]:
    parents: list[list[int]] = [[] for _ in range(count)]
    children: list[list[int]] = [[] for _ in range(count)]
    for parent, child in edges:
        parents[child].append(parent)
        children[parent].append(child)
    return parents, children
