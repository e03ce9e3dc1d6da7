"""The plan of a run over its corpus, and where training stands in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.batch_plan import BatchPlan
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.horizon import Horizon, horizon, write_steps
from ivl_lightning.data.index_file import IndexWriteError
from ivl_lightning.data.mixture import Share, shares
from ivl_lightning.data.pair_plan import PairPlan
from ivl_lightning.data.plan import DEFAULT_COST, NO_ROW, Cost, PlannedStep, PlanSettings, TrainingPlan
from ivl_lightning.data.position import (
    Position,
    check_datasets,
    check_settings,
    is_mid_epoch,
    position_state,
    saved_mixture,
)
from ivl_lightning.structures import PlannedPack

_log = logging.getLogger(__name__)


def mixture_of(corpus: Corpus, config: DataConfig) -> tuple[Share, ...]:
    """Samples of each dataset in an epoch, from `repeat_time`, `data.weights` and `data.resampling`.

    Datasets without a sample are left out, so that a change of their rows changes nothing.

    Raises:
        ValueError: weights that do not name the datasets.
    """
    every = shares(
        [spec.name for spec in corpus.specs],
        corpus.sizes,
        [spec.repeat_time for spec in corpus.specs],
        weights=config.weights,
        resampling=config.resampling,
        fingerprints=[index.fingerprint for index in corpus.indexes],
    )
    return tuple(share for share in every if share.samples)


def plan_settings(
    config: DataConfig,
    *,
    seed: int,
    reduction: str,
    cost: Cost = DEFAULT_COST,
    epochs: int | None = None,
    pairs: bool = False,
) -> PlanSettings:
    """What the plan takes from the configuration; see `PlanSettings`. `pairs` plans preference pairs."""
    batch_samples = None if pairs else config.batch_samples
    return PlanSettings(
        packs_per_step=config.packs_per_step,
        max_tokens=config.max_tokens,
        max_tiles=config.max_pack_tiles,
        # Steps of a fixed number of samples are spread over their packs, without a pool.
        pool_size=0 if pairs or batch_samples is not None else config.pool_size,
        seed=seed,
        reduction=reduction,
        repeat_rule=config.repeat_rule,
        cost=cost,
        max_frames=config.max_frames,
        batch_samples=batch_samples,
        batch_pairs=config.batch_pairs if pairs else None,
        augmentation_seed=config.augmentation_seed if pairs else 0,
        epochs=epochs,
    )


class TrainingStream:
    """Plans epoch after epoch while training reads.

    Args:
        corpus: rows of the run.
        config: the mixture.
        settings: of the plan.

    Attributes:
        mixture: of the current epoch; in the rest of an epoch that another run began it may be that run's.
        view: the datasets of the current epoch; its packs count their rows.
        position: of training, which a checkpoint keeps.

    Raises:
        ValueError: nothing to train on, or weights that do not name the datasets.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, settings: PlanSettings) -> None:
        self.corpus = corpus
        self.settings = settings
        self.position = Position()
        self.mixture = self._own_mixture = mixture_of(corpus, config)
        if not self.mixture:
            raise ValueError(NO_ROW)
        self.view = self._view()
        self._plan = plan_of(self.view, self.mixture, settings)
        self._finished = False

    def _view(self) -> Corpus:
        return self.corpus.view([share.name for share in self.mixture])

    def begin(self, epoch: int) -> None:
        """Stand at the beginning of an epoch.

        Raises:
            ValueError: the epoch cannot be planned.
        """
        self._set(self._own_mixture, self.settings.cost, epoch, None)
        self._finished = False

    def check_run(self, first: int, max_steps: int | None) -> None:
        """Refuse a run of which an epoch cannot be planned; see `TrainingPlan.check`.

        Raises:
            ValueError: as `begin`.
        """
        self._plan.check(first, max_steps)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Stand where a checkpoint was saved.

        The epoch ends as it began; new datasets and weights are taken with the next one.

        Raises:
            ValueError: of mid-epoch, and the rows or settings of the rest of the epoch are not those of this run.
        """
        self.check(state)
        self._finished = state["plan"] is not None and not is_mid_epoch(state)
        mixture, cost = self._own_mixture, self.settings.cost
        if is_mid_epoch(state):
            mixture, cost = saved_mixture(state), tuple(state["cost"])
            check_datasets(mixture, self.corpus)
        self._set(mixture, cost, state["epoch"], state["plan"])

    def advance(self, steps: int) -> None:
        """Pass over steps, into later epochs too, and stand before a step that there is; no medium is opened.

        Args:
            steps: to pass over; 0 only leaves an epoch that has ended.

        Raises:
            ValueError: the run ends before.
        """
        assert steps >= 0, "the plan goes forward"
        left = steps
        while True:
            plan, position = self._plan, self.position
            for step in () if self._finished else plan.epoch(position.epoch, position.state):
                if left == 0:
                    return
                left -= 1
                position.state = step.state
            if self.settings.epochs is not None and position.epoch + 1 >= self.settings.epochs:
                raise ValueError(f"the run ends {left + 1} steps before this one, with epoch {position.epoch}")
            self.begin(position.epoch + 1)

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of mid-epoch whose settings make another plan.

        Raises:
            ValueError: names the setting and both values.
        """
        check_settings(state, self.settings)

    def _set(self, mixture: tuple[Share, ...], cost: Cost, epoch: int, plan_state: dict[str, Any] | None) -> None:
        if (mixture, cost) != (self.mixture, self._plan.settings.cost):
            self.mixture = mixture
            self.view = self._view()
            self._plan = plan_of(self.view, mixture, replace(self.settings, cost=cost))
        self._plan.prepare(epoch)
        self.position.epoch, self.position.state = epoch, plan_state

    def packs(self, rank: int, world_size: int, *, count_in: Path | None = None) -> Iterator[PlannedPack]:
        """One rank's packs, from the position to the end of the epoch.

        Args:
            rank, world_size: see `TrainingPlan.deal`.
            count_in: folder that keeps the number of steps for the horizon of later runs; None keeps nothing.
        """
        plan, epoch, state = self._plan, self.position.epoch, self.position.state
        steps = iter(()) if self._finished else _counted(plan, plan.epoch(epoch, state), count_in)
        return plan.deal(self.position.follow(steps), rank, world_size)

    @property
    def pairs(self) -> PairPlan:
        """The plan of preference pairs.

        Raises:
            ValueError: the run trains on conversations.
        """
        if not isinstance(self._plan, PairPlan):
            raise ValueError("this run trains on conversations, not on preference pairs")
        return self._plan

    def horizon(self, *, max_steps: int | None, cache_dir: Path | None) -> Horizon | None:
        """Optimizer steps of the whole run; see `horizon.horizon`."""
        return horizon(self._plan, max_steps=max_steps, epochs=self.settings.epochs, cache_dir=cache_dir)

    def state_dict(self) -> dict[str, Any]:
        """Position, and what the rest of the epoch depends on; plain numbers, texts and lists."""
        return position_state(self.position, self.mixture, self._plan.settings)


def plan_of(view: Corpus, mixture: tuple[Share, ...], settings: PlanSettings) -> TrainingPlan:
    """The plan of conversations, which fill packs or are counted, or of preference pairs.

    Args:
        view: datasets of the mixture.
        mixture: of every epoch.
        settings: see `plan_settings`.
    """
    if settings.batch_pairs is not None:
        return PairPlan(view.pair_rows, mixture, settings)
    kind = TrainingPlan if settings.batch_samples is None else BatchPlan
    return kind(view.plan_rows, mixture, settings)


def _counted(plan: TrainingPlan, steps: Iterator[PlannedStep], folder: Path | None) -> Iterator[PlannedStep]:
    """The same steps; their number is kept once the epoch ends."""
    count = 0
    for step in steps:
        count = step.number + 1
        yield step
    if not count or folder is None or plan.steps_per_epoch is not None:
        return
    try:
        write_steps(plan, folder, count)
    except IndexWriteError as error:
        # A convenience for later runs is no reason to end this one.
        _log.warning("the number of steps is not kept: %s", error)
