"""Notices when a run stalls, and names the rank and the records that it waits for."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ivl_lightning.callbacks.heartbeat import WAITING, Heartbeat, diagnosis, read_heartbeats
from ivl_lightning.data.datamodule import DynamicPackingDataModule, datamodule_of
from ivl_lightning.structures import PackedBatch, PreferenceBatch, PromptBatch

_log = logging.getLogger(__name__)

HEARTBEATS = "heartbeats"
_STARTING, _ENDING = "starting", "ending"
# What may take as long as it likes: scores of a reference model, writing weights.
_UNLIMITED = (_STARTING, _ENDING)
_EXIT_CODE = 1


class Watchdog(Callback):
    """Warns when a micro-batch, the wait for one, an update, a checkpoint or a validation batch takes too long.

    A thread on each rank writes every few seconds what the rank does to `heartbeats/`. When nothing has moved for
    `minutes`, each rank writes the stacks of its threads to `stall-rank-N.txt`, and rank 0 says who holds up whom.

    Args:
        folder: of the stage; by default the trainer's.
        minutes: how long nothing may move.
        stop: end the process of a stalled rank with exit code 1; otherwise warn, and again after as many minutes.
        every_seconds: between two heartbeats.
        timeout_minutes: of the strategy; collectives that wait so long end the run by themselves.

    Raises:
        ValueError: `minutes` or `every_seconds` is not above 0.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        minutes: float = 10.0,
        stop: bool = False,
        every_seconds: float = 10.0,
        timeout_minutes: float | None = None,
    ) -> None:
        if minutes <= 0 or every_seconds <= 0:
            raise ValueError(f"watchdog: minutes={minutes} and every_seconds={every_seconds} must be above 0")
        self._folder, self._minutes, self._stop = folder, minutes, stop
        self._every, self._timeout = every_seconds, timeout_minutes
        self._watch: _Watch | None = None

    # -- life -----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch from here."""
        self._check_timeout(trainer)
        self._begin(trainer)

    def _check_timeout(self, trainer: L.Trainer) -> None:
        late = self._timeout is not None and self._minutes >= self._timeout
        if late and trainer.world_size > 1 and trainer.is_global_zero:
            _log.warning(
                "callbacks.watchdog.minutes=%g is not below strategy.timeout_minutes=%g: a rank that waits for another "
                "is ended by the timeout before the watchdog can name who stalls",
                self._minutes,
                self._timeout,
            )

    def _begin(self, trainer: L.Trainer) -> None:
        if self._watch is None:
            folder = Path(self._folder or trainer.default_root_dir)
            self._watch = _Watch(trainer, folder, limit=60 * self._minutes, every=self._every, stop=self._stop)
            self._watch.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The run has ended."""
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """It has ended with an error."""
        self._end()

    def _end(self) -> None:
        if self._watch is not None:
            self._watch.end()
        self._watch = None

    # -- what the rank does ---------------------------------------------------------------------------------------

    def _enter(self, phase: str, records: tuple[str, ...] = ()) -> None:
        if self._watch is not None:
            self._watch.enter(phase, records)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PackedBatch | PreferenceBatch, batch_idx: int
    ) -> None:
        """A micro-batch begins."""
        if self._watch is not None:
            self._watch.batches += 1
        self._enter("in forward or backward", batch.sample_ids)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Its gradients are there."""
        self._enter("in the optimizer")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """It is done."""
        self._enter("between two batches")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is written."""
        self._enter("saving a checkpoint")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation, in a fit or alone."""
        self._begin(trainer)
        self._enter("in validation")

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: PackedBatch | PreferenceBatch | PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A batch of it."""
        if isinstance(batch, PromptBatch):
            records = tuple(f"{record.dataset} {record.file}:{record.line}" for record in batch.records)
        else:
            records = batch.sample_ids
        self._enter("in validation", records)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Its end."""
        self._enter("between two batches" if trainer.state.fn == "fit" else _ENDING)

    # A test answers the questions of validation.
    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_end = on_validation_end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What follows may take its time."""
        self._enter(_ENDING)


class _Watch:
    """Writes heartbeats of this rank and looks whether it moves.

    Args:
        trainer: of the run.
        folder: of the stage.
        limit: seconds in which something has to move.
        every: seconds between two heartbeats.
        stop: end the process when it has not.
    """

    def __init__(self, trainer: L.Trainer, folder: Path, *, limit: float, every: float, stop: bool) -> None:
        self.batches = 0
        self._trainer, self._folder = trainer, folder
        self._datamodule: DynamicPackingDataModule = datamodule_of(trainer)
        self._limit, self._every, self._stop = limit, every, stop
        self._phase: tuple[str, tuple[str, ...], float] = (_STARTING, (), time.monotonic())
        self._beat = 0
        self._told_at = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def enter(self, phase: str, records: tuple[str, ...]) -> None:
        """Note what the rank begins; one assignment, so that the thread sees all of it or nothing."""
        self._phase = (phase, records, time.monotonic())

    def end(self) -> None:
        """Stop watching; the heartbeat goes, since the rank is not behind but done."""
        self._ended.set()
        self._thread.join()
        # It may have gone on and ended between two heartbeats.
        self._tell_if_moved(time.monotonic() - self._phase[2])
        own = self._heartbeats / f"rank-{self._trainer.global_rank}.json"
        own.unlink(missing_ok=True)
        # Not empty while other ranks are at work.
        with suppress(OSError):
            self._heartbeats.rmdir()

    @property
    def _heartbeats(self) -> Path:
        return self._folder / HEARTBEATS

    def _run(self) -> None:
        while True:
            try:
                self._look()
            except OSError:
                _log.exception("the watchdog cannot write to %s, and goes on trying", self._folder)
            if self._ended.wait(self._every):
                return

    def _look(self) -> None:
        beat = self._write()
        stalled = beat.seconds > self._limit and beat.phase not in _UNLIMITED
        self._tell_if_moved(beat.seconds)
        if stalled and beat.seconds > self._told_at + self._limit:
            self._told_at = beat.seconds
            self._tell(beat)

    def _tell_if_moved(self, seconds: float) -> None:
        """Say so, if the rank has stalled and does something new."""
        if self._told_at and seconds < self._told_at:
            _log.warning("rank %d goes on", self._trainer.global_rank)
            self._told_at = 0.0

    def _write(self) -> Heartbeat:
        """This moment's heartbeat, also on disk."""
        self._beat += 1
        (phase, records, since), waiting = self._phase, self._datamodule.waiting_for()
        seconds, reading = time.monotonic() - since, dict[str, float]()
        if waiting is not None:
            phase, seconds, records, reading = WAITING, waiting.seconds, waiting.records, waiting.reading
        beat = Heartbeat(
            self._trainer.global_rank,
            socket.gethostname(),
            os.getpid(),
            self._beat,
            self.batches,
            self._trainer.global_step,
            phase,
            seconds,
            records,
            reading,
        )
        self._heartbeats.mkdir(parents=True, exist_ok=True)
        beat.write(self._heartbeats)
        return beat

    def _tell(self, beat: Heartbeat) -> None:
        stacks = self._write_stacks(beat)
        if self._trainer.world_size > 1:
            beats = read_heartbeats(self._heartbeats, self._trainer.world_size)
            # Whoever lives has written another by then; the other ranks wait until rank 0 has spoken.
            if self._pause(2.5 if beat.rank == 0 else 5.0):
                return
        else:
            beats = {}
        if beat.rank == 0:
            now = read_heartbeats(self._heartbeats, self._trainer.world_size)
            lines = "\n".join(f"  {line}" for line in diagnosis(beats, now, self._trainer.world_size))
            _log.warning(
                "the run stalls: nothing has moved for %.0f s\n%s\nStacks of all threads: %s",
                beat.seconds,
                lines,
                stacks.with_name("stall-rank-*.txt"),
            )
        if self._stop:
            _end_process(beat, stacks)

    def _pause(self, beats: float) -> bool:
        """Let some heartbeats pass, this rank's own among them; whether the run has ended meanwhile."""
        until = time.monotonic() + beats * self._every
        while time.monotonic() < until:
            if self._ended.wait(self._every):
                return True
            self._write()
        return False

    def _write_stacks(self, beat: Heartbeat) -> Path:
        path = self._folder / f"stall-rank-{beat.rank}.txt"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {beat.rank}, pid {beat.pid}: {beat.told()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
        return path


def _end_process(beat: Heartbeat, stacks: Path) -> None:
    """End a process whose main thread may never come back, and its loader processes with it."""
    print(
        f"error: rank {beat.rank} ends because nothing has moved for {beat.seconds:.0f} s: {beat.told()}. Its stacks "
        f"are in {stacks}; the same command goes on from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(_EXIT_CODE)
