"""Where training stands in the plan: what a checkpoint keeps, and when a run may go on from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.mixture import Share, epoch_size
from ivl_lightning.data.plan import PlannedStep, PlanSettings
from ivl_lightning.structures import PlannedPack

# `epochs` does not decide what is in an epoch's steps; the cost is taken over with the rest of an epoch.
_FREE_SETTINGS = ("epochs", "cost")


class Position:
    """Follows the plan while it is handed to a loader, which reads ahead of training.

    Attributes:
        epoch: of the last finished step.
        state: of the plan behind that step; None at the beginning of the epoch.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.state: dict[str, Any] | None = None
        self._ahead: deque[PlannedStep] = deque()

    @property
    def steps(self) -> int:
        """Finished steps of the epoch."""
        return 0 if self.state is None else int(self.state["step"])

    def follow(self, steps: Iterable[PlannedStep]) -> Iterator[PlannedStep]:
        """The same steps; their states are remembered until they are trained."""
        self._ahead.clear()
        for step in steps:
            self._ahead.append(step)
            yield step

    def consume(self, planned: PlannedPack) -> None:
        """Note a trained micro-batch; the position moves with the last one of a step."""
        if planned.micro_step + 1 < planned.num_micro_steps:
            return
        while self._ahead:
            step = self._ahead.popleft()
            if (step.epoch, step.number) == (planned.epoch, planned.step):
                self.epoch, self.state = step.epoch, step.state
                return


def position_state(position: Position, mixture: Sequence[Share], settings: PlanSettings) -> dict[str, Any]:
    """A checkpoint's entry: position, and what the rest of the epoch depends on."""
    return {
        "epoch": position.epoch,
        "plan": position.state,
        "mixture": [asdict(share) for share in mixture],
        "settings": _deciding(settings),
        "cost": list(settings.cost),
    }


def is_mid_epoch(state: Mapping[str, Any]) -> bool:
    """Whether samples of the checkpoint's epoch are left to train on."""
    plan = state["plan"]
    return plan is not None and plan["consumed"] < epoch_size(saved_mixture(state))


def saved_mixture(state: Mapping[str, Any]) -> tuple[Share, ...]:
    """The mixture of the checkpoint's epoch."""
    return tuple(Share(**share) for share in state["mixture"])


def check_settings(state: Mapping[str, Any], settings: PlanSettings) -> None:
    """In mid-epoch the rest of the plan must be the same.

    Raises:
        ValueError: a setting that decides the plan differs; names it with both values.
    """
    own = _deciding(settings)
    # Checkpoints from before there was the setting lack it: their plan filled packs.
    for name, value in {"batch_samples": None, **state["settings"]}.items():
        if is_mid_epoch(state) and own[name] != value:
            raise ValueError(
                f"the checkpoint was saved in mid-epoch with {_NAMES.get(name, name)}={value}, this run has "
                f"{own[name]}, which is another plan: finish the epoch with {value}, or start a new run"
            )


_NAMES = {
    "packs_per_step": "data.packs_per_step",
    "max_tokens": "data.max_tokens",
    "max_tiles": "data.max_pack_tiles",
    "max_frames": "data.max_frames",
    "pool_size": "data.pool_size",
    "batch_samples": "data.batch_samples",
    "batch_pairs": "data.batch_pairs",
    "augmentation_seed": "data.augmentation_seed",
    "repeat_rule": "data.repeat_rule",
    "reduction": "loss.reduction (of pairs: preference.parts.generation.head.reduction)",
}


def check_datasets(mixture: Sequence[Share], corpus: Corpus) -> None:
    """In mid-epoch the datasets of the epoch must still be there, unchanged; others may have been added.

    Raises:
        ValueError: a dataset is gone or has other rows; names it.
    """
    rows = {index.name: (len(index), index.fingerprint) for index in corpus.indexes}
    for share in mixture:
        if rows.get(share.name) != (share.rows, share.fingerprint):
            found = f"has {rows[share.name][0]} usable rows now" if share.name in rows else "is gone"
            raise ValueError(
                f"dataset {share.name!r} had {share.rows} usable rows when the checkpoint was saved in mid-epoch and "
                f"{found}, with another content: put it back until the epoch ends (new data are taken at the next "
                "one), or start a new run"
            )


def _deciding(settings: PlanSettings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in _FREE_SETTINGS}
