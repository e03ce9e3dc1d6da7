"""Commands of `train.py` side by side on this machine, each a process with its own GPUs, log and run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from types import FrameType

from ivl_lightning.config.check import ConfigError
from ivl_lightning.constants import PREEMPTED_EXIT_CODE
from ivl_lightning.launch.gpus import VISIBLE, visible_gpus
from ivl_lightning.launch.job import BEGIN, Job, JobOutcome
from ivl_lightning.launch.signals import ENDING, REQUEUE_SIGNAL, taking_signals

JOB_COMMAND = (sys.executable, "-m", "ivl_lightning.cli.job")
_LOOK_SECONDS = 0.1
# One request may come twice: from a terminal or scheduler, and from whoever has started this process.
_REPEAT_SECONDS = 1.0
_THREADS = "OMP_NUM_THREADS"


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    gpus: tuple[str, ...]
    began: float
    asked: bool = False


class LocalJobs:
    """Jobs on this machine. Start them from one thread that lives on: Linux ends them with it.

    A block of it takes the signals that a run takes, and asks all jobs to stop: they save and end with exit code 75. A
    second SIGINT or SIGTERM kills them. What still runs at the end of the block is asked to stop too, and waited for.

    Args:
        at_once: jobs side by side; None: as many as the GPUs allow, of jobs on the CPU one.
        environment: of the jobs; None: that of this process.
        command: what a job is run with; its arguments come last.

    Attributes:
        received: names of the signals so far.
    """

    def __init__(
        self,
        at_once: int | None = None,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = JOB_COMMAND,
    ) -> None:
        self._command = command
        self._environment = dict(os.environ if environment is None else environment)
        self._gpus = visible_gpus(self._environment)
        self._free = list(self._gpus)
        self._at_once = at_once
        self._running: dict[Job, _Running] = {}
        self._asked_at: float | None = None
        self.received: list[str] = []

    @property
    def gpus(self) -> tuple[str, ...]:
        """Those that jobs are given."""
        return self._gpus

    @property
    def running(self) -> tuple[Job, ...]:
        """In the order of their start."""
        return tuple(self._running)

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked all of them to stop; then none is started any more."""
        return self._asked_at is not None

    @property
    def wants_requeue(self) -> bool:
        """Whether that was the signal that a scheduler sends before the end, and no other."""
        return set(self.received) == {REQUEUE_SIGNAL.name}

    def __enter__(self) -> LocalJobs:
        self._listening = taking_signals(self._take)
        self._listening.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self._listening.__exit__(None, None, None)

    def check(self, job: Job) -> None:
        """Refuse a job that there would never be room for.

        Raises:
            ConfigError: it takes more GPUs than there are.
        """
        if job.devices > len(self._gpus):
            raise ConfigError(
                f"job {job.number} takes trainer.devices={job.devices} GPUs, but {len(self._gpus)} are visible here: "
                "lower trainer.devices, widen CUDA_VISIBLE_DEVICES, or add launcher=slurm"
            )

    def has_room(self, job: Job) -> bool:
        """Whether the job can start now."""
        return not self.stopping and len(self._running) < self._limit(job) and job.devices <= len(self._free)

    def start(self, job: Job) -> None:
        """Start a job that there is room for.

        Raises:
            ConfigError: it takes more GPUs than there are.
        """
        self.check(job)
        assert self.has_room(job), f"there is no room for job {job.number}"
        job.log.parent.mkdir(parents=True, exist_ok=True)
        gpus = tuple(self._free[: job.devices])
        with job.log.open("ab") as log:
            log.write(f"{BEGIN}{datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [*self._command, *job.arguments],
                env=self._environment_of(job, gpus),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is for this process, which asks the jobs itself.
                start_new_session=True,
            )
        self._free = self._free[job.devices :]
        self._running[job] = _Running(process, gpus, time.monotonic())
        if self.stopping:
            self.stop(job)

    def stop(self, job: Job) -> None:
        """Ask a running job to save and end; it does so with exit code 75."""
        entry = self._running[job]
        entry.asked = True
        entry.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> list[JobOutcome]:
        """Jobs that have ended: as soon as one has, or none after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            if ended := [self._collect(job) for job in self.running if self._running[job].process.poll() is not None]:
                return ended
            left = deadline - time.monotonic()
            if left <= 0 or not self._running:
                return []
            time.sleep(min(left, _LOOK_SECONDS))

    def close(self) -> None:
        """Ask what still runs to stop, and wait for it."""
        for job in self.running:
            self.stop(job)
        while self._running:
            self.wait(_LOOK_SECONDS)

    def kill(self) -> None:
        """End what runs at once, without saving."""
        for entry in self._running.values():
            # It may have ended a moment ago.
            with suppress(ProcessLookupError):
                os.killpg(entry.process.pid, signal.SIGKILL)

    def _limit(self, job: Job) -> int:
        """Jobs side by side, as long as they find GPUs."""
        if self._at_once is not None:
            return self._at_once
        return len(self._gpus) if job.devices else 1

    def _environment_of(self, job: Job, gpus: tuple[str, ...]) -> dict[str, str]:
        # What one process writes and what the next does shall stand in the log in this order.
        own = {"PYTHONUNBUFFERED": "1"}
        if gpus:
            own[VISIBLE] = ",".join(gpus)
        together = min(self._limit(job), len(self._gpus) // job.devices) if job.devices else self._limit(job)
        if together > 1 and _THREADS not in self._environment:
            own[_THREADS] = str(max(1, _cores() // (together * job.processes)))
        return self._environment | own

    def _collect(self, job: Job) -> JobOutcome:
        entry = self._running.pop(job)
        self._free = [name for name in self._gpus if name in {*self._free, *entry.gpus}]
        code = entry.process.returncode
        if code == -signal.SIGTERM and entry.asked:
            # It was asked before it listened: nothing is lost.
            code = PREEMPTED_EXIT_CODE
        return JobOutcome(job, code, time.monotonic() - entry.began)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number).name)
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            for job in self.running:
                self.stop(job)
        elif number in ENDING and time.monotonic() - self._asked_at > _REPEAT_SECONDS:
            self.kill()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
