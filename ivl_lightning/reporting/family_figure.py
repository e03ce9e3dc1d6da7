"""The picture of a family tree: a box for each network, an arrow for each part that one got from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from ivl_lightning.reporting.family import Descent, Family, Member
from ivl_lightning.reporting.family_layout import Layout, Point, layout
from ivl_lightning.reporting.figures import data_uri
from ivl_lightning.reporting.scaling_text import shortened

DONOR_COLOR = "#D55E00"
_PLAIN_COLOR = "#4d4d4d"
_SOFT_COLOR = "#666666"
_PAGE = 11.0
_BOX = (2.75, 0.76)
_PITCH = 1.28
"""Inches from row to row."""
_LETTERS = 42
"""That fit in a box in small print."""


def family_figure(known: Family, colors: Mapping[str, str]) -> str:
    """Draw a family from top to bottom.

    Args:
        known: members and descents.
        colors: name of a run -> color of its boxes; others are gray.
    """
    plan = layout(len(known.members), [(one.parent, one.child) for one in known.descents])
    width, height = max(_PAGE, plan.width * _BOX[0] + 0.4), (plan.rows - 1) * _PITCH + _BOX[1] + 0.2
    figure = Figure(figsize=(width, height))
    # A unit is an inch, so that the size of the letters fits that of the boxes.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    margin = (width - plan.width * _BOX[0]) / 2
    for descent, way in zip(known.descents, _ways(plan, margin), strict=True):
        _arrow(axes, descent, way)
    for member, point in zip(known.members, plan.boxes, strict=True):
        _box(axes, member, _inches(point, margin), colors.get(member.run or "", _PLAIN_COLOR))
    return data_uri(figure)


def _inches(point: Point, margin: float) -> tuple[float, float]:
    """Center of a box, from the top left corner of the figure."""
    place, row = point
    return margin + place * _BOX[0], 0.1 + _BOX[1] / 2 + row * _PITCH


def _box(axes: Axes, member: Member, center: tuple[float, float], color: str) -> None:
    width, height = _BOX
    left, top = center[0] - width / 2, center[1] - height / 2
    frame = FancyBboxPatch(
        (left, top),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor="white",
        edgecolor=color,
        linewidth=2.6 if member.last else 1.1,
        linestyle="-" if member.lineage else (0, (4, 3)),
        zorder=3,
    )
    axes.add_patch(frame)
    tower = _tower(member)
    name = shortened(member.name, 19 if tower else 30)
    _text(axes, name, left + 0.09, top + 0.15, fontsize=9.5, fontweight="bold", color=color)
    _text(axes, tower, left + width - 0.09, top + 0.15, fontsize=7.5, color=_SOFT_COLOR, ha="right")
    lines = (shortened(member.place, _LETTERS), *_facts(member))
    for place, line in enumerate(lines):
        look = {"fontsize": 7.5 if place == 0 else 8, "color": _SOFT_COLOR if place == 0 else "black"}
        _text(axes, line, left + 0.09, top + 0.32 + 0.155 * place, **look)


def _facts(member: Member) -> Sequence[str]:
    lineage = member.lineage
    if lineage is None:
        return ("no lineage recorded",)
    tokens = "tokens not counted" if lineage.tokens is None else f"{_amount(lineage.tokens)} tokens"
    return (f"trained {', '.join(lineage.trained) or 'nothing'}", f"{lineage.steps:,} steps, {tokens}")


def _tower(member: Member) -> str:
    record = member.lineage.parts.get("vision") if member.lineage else None
    return f"tower {record.after[:8]}" if record and record.after else ""


def _amount(tokens: int) -> str:
    for size, name in ((10**9, "billion"), (10**7, "million")):
        if tokens >= size:
            return f"{tokens / (10**6 if name == 'million' else size):,.1f} {name}"
    return f"{tokens:,}"


def _arrow(axes: Axes, descent: Descent, way: Sequence[tuple[float, float]]) -> None:
    """A curve from the lower edge of the parent to the upper edge of the child, with what it brings."""
    color = DONOR_COLOR if descent.donor else _PLAIN_COLOR
    vertices, codes = [way[0]], [Curve.MOVETO]
    for start, end in pairwise(way):
        # It turns early and comes down straight, where its label stands.
        turn = start[1] + 0.3 * (_PITCH - _BOX[1])
        vertices += [(start[0], turn), (end[0], turn), end]
        codes += [Curve.CURVE4] * 3
    look: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0, "zorder": 2}
    width = 1.9 if descent.donor else 1.2
    axes.add_patch(FancyArrowPatch(path=Curve(vertices, codes), color=color, linewidth=width, **look))
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    end = way[-1]
    _text(axes, ", ".join(descent.brings), end[0], end[1] - 0.24, fontsize=8, color=color, ha="center", bbox=paper)


def _ways(plan: Layout, margin: float) -> list[list[tuple[float, float]]]:
    """The points of each arrow; those at one edge of a box are spread along it, in the order of where they go."""
    routes = [[_inches(point, margin) for point in route] for route in plan.routes]
    half = _BOX[1] / 2
    return [
        [
            (_spread(route[0], route[1], [one[1] for one in routes if one[0] == route[0]]), route[0][1] + half),
            *route[1:-1],
            (_spread(route[-1], route[-2], [one[-2] for one in routes if one[-1] == route[-1]]), route[-1][1] - half),
        ]
        for route in routes
    ]


def _spread(box: tuple[float, float], other: tuple[float, float], others: Sequence[tuple[float, float]]) -> float:
    """Where along the edge of a box the arrow to or from `other` ends."""
    place = sorted(others).index(other)
    return box[0] + ((place + 0.5) / len(others) - 0.5) * _BOX[0]


def _text(axes: Axes, text: str, x: float, y: float, **look: Any) -> None:
    # parse_math: a folder's name may hold two dollar signs.
    axes.text(x, y, text, va="center", parse_math=False, **look)
