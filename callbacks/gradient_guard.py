"""A loss or gradient that is not finite stops the run before the update, and the step's samples are written down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from ivl_lightning.callbacks.step_checkpoints import savers_of
from ivl_lightning.stages.base import Stage
from ivl_lightning.stages.step_record import StepGradients, StepRecord, StepWatch, bad_step_file, is_finite

_SHOWN = 10
_COMMAND_FILE = "command.txt"


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is not finite; the step was not taken."""


class GradientGuard(StepWatch):
    """Judges each step before its update, on all ranks alike; logs `train/grad_norm` and those of the parts that train.

    Norms are those before clipping. It costs one reduction of four numbers a step.

    Args:
        folder: of the stage; by default the trainer's. Bad steps are written to `bad_steps/` below it.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self._folder = folder

    def judge(self, trainer: L.Trainer, stage: Stage, step: StepGradients) -> None:
        """Log; stop where something is not finite, with the state before the step saved.

        Raises:
            NonFiniteError: says where the step's samples are written and how to run it again.
        """
        stage.log("train/grad_norm", step.norm, batch_size=1)
        for part, norm in step.norms.items():
            stage.log(f"train/grad_norm/{part}", norm, batch_size=1)
        if step.finite:
            return
        record = self.record(trainer, step, global_step=trainer.global_step)
        folder = Path(self._folder or trainer.default_root_dir)
        file = bad_step_file(folder, record.global_step)
        if trainer.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record.as_json(), indent=1, ensure_ascii=False), encoding="utf-8")
        kept = _keep_state(trainer)
        raise NonFiniteError("\n".join(_told(record, file, _command(folder), kept=kept)))


def _keep_state(trainer: L.Trainer) -> bool:
    """Save what the finished steps have made, if somebody here saves; every rank must call it."""
    savers = savers_of(trainer)
    for saver in savers:
        saver.save(trainer)
    return bool(savers) and trainer.global_step > 0


def _told(record: StepRecord, file: Path, command: str, *, kept: bool) -> Iterator[str]:
    """The error, line by line."""
    bad = [micro for micro in record.micro_batches if not is_finite(micro.loss)]
    what = [*["loss"] * bool(bad), *["gradient"] * bool(record.bad_parts)]
    yield (
        f"step {record.global_step} (epoch {record.epoch}, step {record.step_of_epoch} of it) was not taken: "
        f"not finite {'are' if len(what) > 1 else 'is'} its {' and '.join(what)}"
    )
    culprits = [
        f"  {sample.sample} (rank {micro.rank}, micro-batch {micro.micro_step}): loss {sample.loss}"
        for micro in record.micro_batches
        for sample in micro.samples
        if not is_finite(sample.loss)
    ]
    yield from culprits[:_SHOWN]
    if len(culprits) > _SHOWN:
        yield f"  and {len(culprits) - _SHOWN} more samples"
    norms = ", ".join(f"{part} {norm:.4g}" for part, norm in record.norms.items())
    yield f"Norm of the gradient before clipping: {norms}"
    yield f"All samples of the step are in {file}"
    yield f"Run this very batch again, without an update: {command} replay={record.global_step}"
    if culprits:
        yield "Look at the samples above; a run in another run_dir can leave them out with data.exclude=FILE"
    else:
        yield "No sample's loss stands out: in another run_dir try a lower optim.lr or a longer warm-up"
    if kept:
        yield "The state before the step is saved: if code or machine was at fault, the same command goes on there"


def _command(folder: Path) -> str:
    """What started the run, as far as it is known."""
    file = folder.parent / _COMMAND_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "python train.py ..."
