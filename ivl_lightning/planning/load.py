"""What the packs of an optimizer step hold: as the plan packs measured data, or at the caps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ivl_lightning.config.schema import DataConfig, Rows
from ivl_lightning.data.plan import PlannedStep, TrainingPlan, idle_share


@dataclass(frozen=True, slots=True)
class Load:
    """A step's work over all ranks.

    Attributes:
        source: `index` where measured data were planned, `batches` where batches were counted, else `caps`.
        samples: conversations or pairs; None where only measured data tell.
        tokens, tiles, labels: of all packs.
        squares: sum of squared document lengths.
        idle: share of the ranks' time that is spent waiting for the slowest.
    """

    source: Literal["index", "batches", "caps"]
    samples: float | None
    tokens: float
    squares: float
    tiles: float
    labels: float
    idle: float


def load_at_caps(data: DataConfig, rows: Rows, *, tile_tokens: int, label_share: float) -> Load:
    """Every pack filled with documents as long as they may be, and with tiles as far as tokens hold them.

    Args:
        data: caps and samples of a step.
        rows: conversations or pairs.
        tile_tokens: context tokens of a tile.
        label_share: supervised share of the tokens.
    """
    longest = min(data.max_sample_tokens or data.max_tokens, data.max_tokens)
    samples = data.batch_pairs if rows == "pairs" else data.batch_samples
    packed = float(data.packs_per_step * data.max_tokens)
    tokens = packed if samples is None else min(packed, float(samples * longest))
    packs = tokens / data.max_tokens
    tiles = packs * tiles_of_pack(data, tile_tokens)
    return Load("caps", samples, tokens, tokens * longest, tiles, label_share * tokens, 0.0)


def tiles_of_pack(data: DataConfig, tile_tokens: int) -> int:
    """Tiles that a pack may have by both caps."""
    return min(data.max_pack_tiles, data.max_tokens // max(tile_tokens, 1))


def planned_load(plan: TrainingPlan, ranks: int, *, packs: int) -> Load:
    """The mean of the first steps of an epoch; the last of them may be short and is left out if there are others.

    Squared lengths are found from what the plan says a pack costs, which is linear in tokens, squares and tiles.

    Args:
        plan: of the run.
        ranks: data-parallel ones.
        packs: packs to plan at least.

    Raises:
        ValueError: the epoch cannot be planned.
    """
    steps = _first(plan.epoch(0), packs, plan.settings.packs_per_step)
    per_token, per_square, per_tile = plan.settings.cost
    tokens = float(sum(pack.tokens for step in steps for pack in step.packs))
    tiles = float(sum(pack.tiles for step in steps for pack in step.packs))
    cost = sum(sum(step.costs) for step in steps)
    rows = [np.asarray(pack.samples, dtype=np.int64) % len(plan.rows) for step in steps for pack in step.packs]
    labels = float(sum(plan.rows.labels[chosen].sum() for chosen in rows if len(chosen)))
    return Load(
        source="index",
        samples=steps[-1].consumed / len(steps),
        tokens=tokens / len(steps),
        squares=max(cost - per_token * tokens - per_tile * tiles, 0.0) / per_square / len(steps),
        tiles=tiles / len(steps),
        labels=labels / len(steps),
        idle=idle_share([cost for step in steps for cost in step.costs], ranks),
    )


def _first(steps: Iterable[PlannedStep], packs: int, packs_per_step: int) -> list[PlannedStep]:
    wanted = max(-(-packs // packs_per_step), 1)
    found: list[PlannedStep] = []
    for step in steps:
        found.append(step)
        if len(found) == wanted:
            return found
    return found[:-1] or found
