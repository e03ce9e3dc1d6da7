"""Forecast of an epoch: the mixture, the packs that training will plan, and what ranks would wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.batch_plan import BatchPlan
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.mixture import epoch_size
from ivl_lightning.data.plan import Cost, PlannedStep, idle_share
from ivl_lightning.data.stream import mixture_of, plan_of, plan_settings
from ivl_lightning.reporting.audit.findings import Forecast
from ivl_lightning.reporting.audit.progress import tracked


def forecast(corpus: Corpus, config: DataConfig, seed: int, *, cost: Cost, show: bool) -> Forecast | None:
    """What packing makes of the first epoch; None where it has no sample.

    Args:
        corpus: rows that train.
        config: mixture, caps, pool and packs of a step.
        seed: of the run.
        cost: modeled work of the stage.
        show: a progress bar.
    """
    mixture = mixture_of(corpus, config)
    if not epoch_size(mixture):
        return None
    view = corpus.view([share.name for share in mixture])
    # How labels are weighed does not decide what is packed.
    settings = plan_settings(config, seed=seed, reduction="token", cost=cost, pairs=corpus.pairs)
    plan = plan_of(view, mixture, settings)
    if isinstance(plan, BatchPlan):
        # Training would refuse fewer packs than a step's samples need; the forecast says how many that are.
        packs = max(config.packs_per_step, plan.packs_needed(0))
        config = replace(config, packs_per_step=packs)
        plan = plan_of(view, mixture, replace(settings, packs_per_step=packs))
    steps = tracked(plan.epoch(0), "forecasting steps", int(plan.fewest_steps()) + 1, show=show)
    return summarize([_bare(step) for step in steps], config)


def _bare(step: PlannedStep) -> tuple[list[tuple[int, int, int]], tuple[float, ...]]:
    """Samples, tokens and tiles of a step's packs, and the costs; the rest of a long epoch's steps is not kept."""
    return [(len(pack.samples), pack.tokens, pack.tiles) for pack in step.packs if pack.samples], step.costs


def summarize(steps: Sequence[tuple[list[tuple[int, int, int]], tuple[float, ...]]], config: DataConfig) -> Forecast:
    """The forecast of an epoch.

    Args:
        steps: of each step samples, tokens and tiles of its packs, and the modeled cost of each pack.
        config: caps of a pack.
    """
    packs = np.asarray([pack for step, _ in steps for pack in step], dtype=np.int64)
    samples, tokens, tiles = (int(total) for total in packs.sum(axis=0))
    bound = max(-(-tokens // config.max_tokens), -(-tiles // config.max_pack_tiles) if config.max_pack_tiles else 0)
    return Forecast(
        samples=samples,
        tokens=tokens,
        tiles=tiles,
        packs=len(packs),
        lower_bound=bound,
        efficiency=bound / len(packs),
        fill_tokens=tokens / (len(packs) * config.max_tokens),
        fill_tiles=tiles / (len(packs) * config.max_pack_tiles) if config.max_pack_tiles else 0.0,
        samples_per_pack=samples / len(packs),
        most_samples=int(packs[:, 0].max()),
        packs_per_step=config.packs_per_step,
        steps=len(steps),
        # Alone nobody waits: of how many ranks there will be, a single pack a step says nothing.
        idle=idle_share([cost for _, costs in steps for cost in costs], config.packs_per_step)
        if config.packs_per_step > 1
        else None,
    )
