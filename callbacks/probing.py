"""Asking a network in the middle of its training, without a trace in the training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import lightning as L
import torch
from torch import nn

from ivl_lightning.callbacks.ema import EMA
from ivl_lightning.callbacks.exact_resume import generator_states, set_generator_states
from ivl_lightning.callbacks.step_clock import StepClock
from ivl_lightning.data.probe import ProbeSet
from ivl_lightning.data.ranks import gathered
from ivl_lightning.models.shard import reshard
from ivl_lightning.stages.base import Stage
from ivl_lightning.structures import Answer


def probe_answers(trainer: L.Trainer, stage: Stage, probe: ProbeSet) -> dict[int, Answer]:
    """Row of the probe set -> its answer, on every rank; every rank must call it, between two optimizer steps.

    Rows are always answered in the same groups: with others an answer may differ by rounding, and would seem to have
    been learned. With averaged weights (`EMA`) those answer, as in validation.

    Raises:
        RowError: a picture that was measured cannot be decoded.
    """
    own: dict[int, Answer] = {}
    with undisturbed(trainer, stage):
        for rows, batch in probe.batches(trainer.global_rank, trainer.world_size):
            own.update(zip(rows, stage.answer(batch.to(trainer.strategy.root_device)), strict=True))
    everyone = {row: answer for answers in gathered(own, trainer.world_size) for row, answer in answers.items()}
    return {row: everyone[row] for row in probe.rows}


@contextmanager
def undisturbed(trainer: L.Trainer, stage: Stage) -> Iterator[None]:
    """The network as in validation; afterwards modes, weights, random numbers and clocks are as they were."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # the trainer's connector sets it
    with ExitStack() as stack:
        stack.enter_context(_unclocked([one for one in callbacks if isinstance(one, StepClock)]))
        stack.callback(reshard, stage)
        stack.callback(set_generator_states, generator_states())
        stack.enter_context(_evaluating(stage))
        for averaging in [one for one in callbacks if isinstance(one, EMA)]:
            stack.enter_context(averaging.in_use(stage))
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.precision_plugin.val_step_context())
        yield


@contextmanager
def _unclocked(clocks: Sequence[StepClock]) -> Iterator[None]:
    begin = time.monotonic()
    yield
    for clock in clocks:
        clock.leave_out(time.monotonic() - begin)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # Each by itself: frozen parts are in eval mode while others train.
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
