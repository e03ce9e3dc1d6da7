"""Forecast of an epoch: the mixture, the packs that training will plan, and what ranks would wait for each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.mixture import Share, epoch_size, shares
from ivl_lightning.data.plan import PlannedStep, PlanRows, PlanSettings, TrainingPlan, idle_share
from ivl_lightning.reporting.audit.findings import Forecast
from ivl_lightning.reporting.audit.progress import tracked


def mixture_of(corpus: Corpus, config: DataConfig) -> tuple[Share, ...]:
    """Samples of each dataset in an epoch."""
    return shares(
        [spec.name for spec in corpus.specs],
        corpus.sizes,
        [spec.repeat_time for spec in corpus.specs],
        weights=config.weights,
        resampling=config.resampling,
    )


def training_plan(corpus: Corpus, config: DataConfig, seed: int) -> TrainingPlan:
    """The plan of training on the corpus.

    Raises:
        ValueError: an epoch has no sample.
    """
    videos = bool(corpus.column("frames").any())
    rows = PlanRows(
        tokens=corpus.column("tokens"),
        labels=corpus.column("labels"),
        tiles=corpus.column("tiles"),
        most_frames=corpus.column("frames"),
        fewest_frames=corpus.column("min_frames"),
        frame_tokens=corpus.encoders[0].frame_tokens if videos else np.empty(0, dtype=np.int64),
    )
    settings = PlanSettings(
        packs_per_step=config.packs_per_step,
        max_tokens=config.max_tokens,
        max_tiles=config.max_pack_tiles,
        pool_size=config.pool_size,
        seed=seed,
        # Decides the weight of labels, not what is packed.
        reduction="token",
        repeat_rule=config.repeat_rule,
    )
    return TrainingPlan(rows, mixture_of(corpus, config), settings)


def forecast(corpus: Corpus, config: DataConfig, seed: int, *, show: bool) -> Forecast | None:
    """What packing makes of the first epoch; None where it has no sample.

    Args:
        corpus: as indexed.
        config: mixture, caps, pool and packs of a step.
        seed: of the run.
        show: a progress bar.
    """
    if not epoch_size(mixture_of(corpus, config)):
        return None
    plan = training_plan(corpus, config, seed)
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
        idle=idle_share([cost for _, costs in steps for cost in costs], config.packs_per_step),
    )
