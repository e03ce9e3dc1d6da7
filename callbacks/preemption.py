"""Stopping on request: a signal, a checkpoint at the next optimizer boundary, and an exit that says "go on later".

Lightning's own handlers save in the middle of a batch, or broadcast inside the handler, where it may meet another
collective. Here a handler only raises a flag; the ranks agree on it between two steps.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint

from ivl_lightning.callbacks.step_checkpoints import savers_of
from ivl_lightning.constants import PREEMPTED_EXIT_CODE

DEFAULT_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")


class PreemptedError(Exception):
    """The run has saved and stops, because a signal asked for it. No fault: the same command continues it.

    Attributes:
        steps: finished optimizer steps.
        exit_code: what this process is to end with.
    """

    def __init__(self, name: str, steps: int, exit_code: int) -> None:
        super().__init__(f"stopped by {name} behind step {steps}, which is saved; the same command goes on from there")
        self.steps, self.exit_code = steps, exit_code


class Preemption(Checkpoint):
    """Ends a run on a signal, on all ranks behind the same step, wherever the signal came in.

    It saves with the trainer's `StepCheckpoints`, and is a `Checkpoint` itself so that Lightning runs it behind all
    callbacks that count something.

    Args:
        signals: names of the signals that ask for it; [] for none.

    Raises:
        ValueError: no such signal.
    """

    def __init__(self, signals: Sequence[str] = DEFAULT_SIGNALS) -> None:
        if unknown := [name for name in signals if name not in signal.Signals.__members__]:
            raise ValueError(f"preemption on signals={list(signals)}: there is no signal {', '.join(unknown)}")
        self._signals = [signal.Signals[name] for name in signals]
        self._asked_by: str | None = None
        self._stop: PreemptedError | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen; Lightning has set its own handlers just before.

        Raises:
            ValueError: nothing among the trainer's callbacks could save.
        """
        if self._signals and not savers_of(trainer):
            raise ValueError("Preemption saves with StepCheckpoints: give the trainer this callback too")
        self._handlers = {number: signal.signal(number, self._ask) for number in self._signals}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked_by = signal.Signals(number).name

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind a step: save if any rank was asked to stop. It stops with the next hook, when the step is logged."""
        planned = batch.planned
        if planned.micro_step + 1 == planned.num_micro_steps:
            self._save_if_asked(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop.

        Raises:
            PreemptedError: on all ranks.
        """
        self._stop_if_saved()

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """A validation may take longer than a scheduler waits; training goes on behind the step before it.

        Raises:
            PreemptedError: on all ranks.
        """
        if self._handlers and self._stop is None:
            self._save_if_asked(trainer)
        self._stop_if_saved()

    def _stop_if_saved(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _save_if_asked(self, trainer: L.Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._asked_by is not None, all=False):
            return
        for checkpoints in savers_of(trainer):
            checkpoints.save(trainer)
            checkpoints.finish(trainer)
        name = self._asked_by or "a signal to another rank"
        self._stop = PreemptedError(name, trainer.global_step, _exit_code(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen no more; stop, if the last step was the one behind which to stop.

        Raises:
            PreemptedError: on all ranks.
        """
        self._restore()
        self._stop_if_saved()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._restore()

    def _restore(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)


def _exit_code(trainer: L.Trainer) -> int:
    """Lightning kills a run of which a process that it has started itself ends with another code than 0."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    started_by_lightning = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
    return 0 if started_by_lightning else PREEMPTED_EXIT_CODE
