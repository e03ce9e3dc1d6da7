"""The plan of preference training: steps of a fixed number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.data.batch_plan import BatchPlan
from ivl_lightning.data.mixture import Share, epoch_order
from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.data.plan import PlanRows, PlanSettings, draw_frames, with_numbers
from ivl_lightning.structures import Pack


@dataclass(frozen=True, slots=True)
class PairRows(PlanRows):
    """What the plan knows of the pairs of all datasets laid end to end, `[N]` each.

    Attributes:
        chosen_labels: supervised tokens of each chosen answer.
        digests: hash of each row's bytes.
    """

    chosen_labels: NDArray[np.int32]
    digests: NDArray[np.uint64]


class PairPlan(BatchPlan):
    """Plans epochs of preference pairs; see `BatchPlan`.

    A step holds `batch_pairs` pairs, and an epoch's last one what is left. The frames of a video are drawn from
    (augmentation_seed, row), the same in every epoch.

    Args:
        rows: of the mixture's datasets.
        mixture: samples of each dataset in an epoch.
        settings: with `batch_pairs`.

    Raises:
        ValueError: there is no pair to train on, or batch_pairs is below 1.
    """

    rows: PairRows
    size_setting: ClassVar[str] = "data.batch_pairs"
    unit: ClassVar[str] = "pairs"

    def __init__(self, rows: PairRows, mixture: Sequence[Share], settings: PlanSettings) -> None:
        super().__init__(rows, mixture, settings)

    @property
    def batch(self) -> int:
        """Pairs of a step."""
        assert self.settings.batch_pairs is not None
        return self.settings.batch_pairs

    def used_rows(self, max_steps: int | None) -> NDArray[np.int64]:
        """Rows that a run trains on, rising; all where it has no end.

        Args:
            max_steps: of the trainer; None where only `settings.epochs` ends the run.
        """
        steps = self.steps_of_run(max_steps)
        if steps is None:
            return np.arange(len(self.rows))
        used = np.zeros(len(self.rows), dtype=bool)
        for epoch in range(-(-steps // self.steps_per_epoch)):
            order = epoch_order(self.mixture, seed=self.settings.seed, epoch=epoch, rule=self.settings.repeat_rule)
            used[order[: (steps - epoch * self.steps_per_epoch) * self.batch] % len(self.rows)] = True
        return np.flatnonzero(used)

    def packs_of(self, rows: NDArray[np.int64]) -> list[Pack]:
        """Some rows in packs, each row once, with the frames it is trained with."""
        frames, tokens, tiles = self._sizes(rows, 0)
        planner = PackPlanner(self.settings.max_tokens, self.settings.max_tiles)
        return [with_numbers(pack, rows, frames) for pack in planner.plan(tokens, tiles)]

    def _sizes(
        self, order: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int16] | None, NDArray[np.int32], NDArray[np.int32]]:
        rows = order % len(self.rows)
        tokens, tiles, most = self.rows.tokens[rows], self.rows.tiles[rows], self.rows.most_frames[rows]
        if not most.any():
            return None, tokens, tiles
        fewest, seed = self.rows.fewest_frames[rows], self.settings.augmentation_seed
        frames = draw_frames(self.rows.digests[rows], fewest, most, self.settings.max_frames, seed=seed, epoch=0)
        return frames, *self._shortened(tokens, tiles, most, frames)

    @property
    def _labels(self) -> NDArray[np.int32]:
        return self.rows.chosen_labels
