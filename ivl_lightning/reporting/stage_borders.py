"""Where the stages of several runs begin on one axis of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ivl_lightning.reporting.scaling import Curve


@dataclass(frozen=True, slots=True)
class Border:
    """A line where a stage begins.

    Attributes:
        stage: its name.
        tokens: mean over the runs.
        runs: whose stage begins there.
    """

    stage: str
    tokens: float
    runs: list[str]


def borders(curves: Sequence[Curve], reach: float) -> list[Border]:
    """Where stages begin, from left to right; beginnings of the same stage within `reach` tokens are one."""
    found: list[Border] = []
    begun = ((one.tokens, one.stage, curve.name) for curve in curves for one in curve.stages)
    for tokens, stage, run in sorted(begun):
        last = next((border for border in reversed(found) if border.stage == stage), None)
        if last is None or tokens - last.tokens > reach:
            found.append(Border(stage, tokens, [run]))
            continue
        count = len(last.runs)
        found[found.index(last)] = Border(stage, (last.tokens * count + tokens) / (count + 1), [*last.runs, run])
    return sorted(found, key=lambda border: border.tokens)
