"""The picture of progressive scaling: scores of the sequels over the tokens that each trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Transform, blended_transform_factory

from ivl_lightning.reporting.figures import data_uri
from ivl_lightning.reporting.placing import apart
from ivl_lightning.reporting.scaling import Row, final_score
from ivl_lightning.reporting.scaling_text import shortened
from ivl_lightning.reporting.stage_borders import borders
from ivl_lightning.reporting.table import percent

# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL_COLOR = "#4d4d4d"
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LONGEST_NAME = 28
_UNITS = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1.0, ""))
_LINE_OF_TEXT = 0.05
"""Height of a line of text, and a little more, as a share of the panel's."""
_SAME_PLACE = 0.02
"""Beginnings of a stage in two runs that lie closer, as a share of the axis, are drawn as one."""
_LETTER = 0.0085
"""Width of a letter above the panel, as a share of the panel's."""
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}


def scaling_figure(rows: Sequence[Row]) -> str | None:
    """A curve for each sequel with two scores or more; None where there is none."""
    drawn = {row.curve.name: color for row, color in zip(rows, sequel_colors(rows), strict=True) if _is_line(row)}
    if not drawn:
        return None
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    axes = figure.subplots()
    curves = [row for row in rows if row.curve.name in drawn]
    longest = max(1, *(row.curve.measured[-1].tokens for row in curves))
    shown = [score for row in rows if row in curves or row.control for score in _scores(row)]
    _frame(axes, shown, sum(row.reached is not None for row in curves), longest)
    for place, row in enumerate(curves):
        _curve(axes, row, drawn[row.curve.name], _MARKERS[place % len(_MARKERS)])
    _goal(axes, rows, curves)
    _reached(axes, curves, drawn)
    _names(axes, curves, drawn)
    _stages(axes, curves, drawn, longest)
    return data_uri(figure)


def sequel_colors(rows: Sequence[Row]) -> list[str]:
    """A color for each sequel; the control's is gray."""
    others = [row for row in rows if not row.control]
    return [CONTROL_COLOR if row.control else COLORS[others.index(row) % len(COLORS)] for row in rows]


def _is_line(row: Row) -> bool:
    return len(row.curve.measured) > 1


def _frame(axes: Axes, scores: Sequence[float], lines_below: int, longest: int) -> None:
    high = min(max(scores) + 0.12 * max(max(scores) - min(scores), 5.0), 104)
    # Room below the curves for the numbers of tokens.
    room = 0.06 + _LINE_OF_TEXT * lines_below
    low = (min(scores) - room * high) / (1 - room)
    axes.set_ylim(low, high)
    axes.set_yticks([tick for tick in MaxNLocator(nbins=7).tick_values(low, high) if max(low, 0) <= tick <= high])
    axes.set_xlim(0, 1.01 * longest)
    divisor, unit = next((size, name) for size, name in _UNITS if longest >= size or size == 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / divisor:,g}"))
    axes.set_xlabel(f"{unit}tokens trained on in the run", fontsize=10)
    axes.set_ylabel("score (%)", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Axes, row: Row, color: str, marker: str) -> None:
    axes.plot(_tokens(row), _scores(row), color=color, marker=marker, markersize=4.5, linewidth=1.8, zorder=3)


def _tokens(row: Row) -> list[int]:
    return [one.tokens for one in row.curve.measured]


def _scores(row: Row) -> list[float]:
    return [100 * one.score for one in row.curve.measured]


def _goal(axes: Axes, rows: Sequence[Row], curves: Sequence[Row]) -> None:
    control = next((row for row in rows if row.control), None)
    if control is None:
        return
    score = 100 * final_score(control.curve)
    axes.axhline(score, color=CONTROL_COLOR, linestyle=(0, (5, 4)), linewidth=1.1, zorder=2)
    text = f"{control.curve.name}'s final score, {percent(score / 100)}"
    left, above = _free_place(axes, curves, score, _LETTER * len(text))
    across = blended_transform_factory(axes.transAxes, axes.transData)
    look = {"color": CONTROL_COLOR, "va": "bottom" if above else "top", "bbox": _PAPER}
    _note(axes, text, (left, score), (0, 4 if above else -4), across, **look)


def _free_place(axes: Axes, curves: Sequence[Row], score: float, width: float) -> tuple[float, bool]:
    """Where a text along a horizontal line is farthest from all curves: its left end and whether it stands above."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]

    def distance(place: tuple[float, bool]) -> float:
        left, above = place
        middle = (score - low) / (high - low) + (0.6 if above else -0.6) * _LINE_OF_TEXT
        spots = np.linspace(left, left + width, 9)
        heights = [
            (np.interp(spots * right, _tokens(row), _scores(row), left=np.nan, right=np.nan) - low) / (high - low)
            for row in curves
        ]
        return float(np.nanmin(np.abs(np.append(np.concatenate(heights), 1.0) - middle)))

    return max(((left, above) for left in (0.008, 0.2, 0.4, 0.6, 0.75) for above in (True, False)), key=distance)


def _reached(axes: Axes, curves: Sequence[Row], colors: dict[str, str]) -> None:
    """A ring where a curve first reaches the score, and a line down to how many tokens that took."""
    reached = [(row.reached, row) for row in curves if row.reached]
    foot = blended_transform_factory(axes.transData, axes.transAxes)
    for place, (one, row) in enumerate(sorted(reached, key=lambda pair: -pair[0].tokens)):
        color, tokens, score = colors[row.curve.name], one.tokens, 100 * one.score
        axes.plot([tokens], [score], "o", markersize=12, fillstyle="none", color=color, markeredgewidth=1.8, zorder=4)
        axes.plot([tokens, tokens], [axes.get_ylim()[0], score], color=color, linestyle=":", linewidth=1.3, zorder=2)
        text = f"{tokens:,} tokens"
        if row.share is not None and not row.control:
            text += f" ({row.share:.0%})"
        # One above the other: two that lie close would overlap.
        height = 0.03 + _LINE_OF_TEXT * place
        left = tokens > 0.25 * axes.get_xlim()[1]
        look = {"color": color, "ha": "right" if left else "left", "va": "bottom", "bbox": _PAPER}
        _note(axes, text, (tokens, height), (-4 if left else 4, 0), foot, **look)


def _names(axes: Axes, curves: Sequence[Row], colors: dict[str, str]) -> None:
    """Each run's name beside the end of its curve, moved apart where two would overlap."""
    low, high = axes.get_ylim()
    ends = sorted(curves, key=lambda row: final_score(row.curve))
    heights = apart(
        [(100 * final_score(row.curve) - low) / (high - low) for row in ends], [_LINE_OF_TEXT] * (len(ends) - 1)
    )
    at_end = blended_transform_factory(axes.transData, axes.transAxes)
    for row, height in zip(ends, heights, strict=True):
        end = row.curve.measured[-1]
        look = {"fontsize": 10, "fontweight": "bold", "color": colors[row.curve.name], "va": "center"}
        _note(axes, shortened(row.curve.name, _LONGEST_NAME), (end.tokens, height), (11, 0), at_end, **look)


def _stages(axes: Axes, rows: Sequence[Row], colors: dict[str, str], longest: int) -> None:
    """Thin lines where stages begin, and their names above the panel."""
    above = blended_transform_factory(axes.transData, axes.transAxes)
    ends: list[float] = []
    for border in borders([row.curve for row in rows], _SAME_PLACE * longest):
        if border.tokens >= longest:
            # It has no score yet.
            continue
        color = "#777777" if len(border.runs) > 1 or len(rows) == 1 else colors[border.runs[0]]
        axes.axvline(border.tokens, color=color, linewidth=0.7, zorder=1)
        name = border.stage.replace("_", " ")
        start = border.tokens / longest
        level = next((place for place, end in enumerate(ends) if end < start), len(ends))
        ends[level : level + 1] = [start + _LETTER * (len(name) + 1)]
        _note(axes, name, (border.tokens, 1 + _LINE_OF_TEXT * level), (0, 3), above, color=color, va="bottom")


def _note(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], system: Transform, **look: Any
) -> None:
    """Write a text so many points beside a point of a system of coordinates."""
    # parse_math: a folder's name may hold two dollar signs.
    style = {"fontsize": 9, "annotation_clip": False, "parse_math": False, **look}
    axes.annotate(text, point, offset, xycoords=system, textcoords="offset points", **style)
