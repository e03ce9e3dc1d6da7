"""Signals to the launching process are meant for the stage that runs below it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

RELAYED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ENDING = (signal.SIGTERM, signal.SIGINT)
REQUEUE_SIGNAL = signal.SIGUSR1
"""What Slurm is asked to send before the time is over; to a job that is canceled it sends SIGTERM."""

# Slurm signals all processes of a step, and torchrun passes on what it got: two at once are one request.
_REPEAT_SECONDS = 1.0


def shell_code(code: int) -> int:
    """Exit code of a process as a shell gives it, also of one that a signal has killed."""
    return code if code >= 0 else 128 - code


@contextmanager
def taking_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a handler take the signals that are for what runs below this process, for the length of the block."""
    before = {number: signal.signal(number, handler) for number in RELAYED}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopRequestedError(BaseException):
    """A signal came while no stage ran: nothing is to be saved. No Exception, so that nobody takes it for a fault."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name} between two stages; the same command goes on")


class JobsStoppedError(BaseException):
    """A command that starts jobs was asked to stop; no Exception, so that no sweeper takes it for a fault and goes on.

    Args:
        told: what became of the jobs.

    Attributes:
        wants_requeue: whether the signal that a scheduler sends before the end has asked for it.
    """

    def __init__(self, told: str, *, wants_requeue: bool = False) -> None:
        super().__init__(told)
        self.wants_requeue = wants_requeue


class SignalRelay:
    """Hands signals on to the stage's process; a second SIGINT or SIGTERM kills it.

    Args:
        raises: where no stage runs, a signal raises `StopRequestedError`; else it is kept for the next stage.

    Attributes:
        received: names of the signals so far.
    """

    def __init__(self, *, raises: bool) -> None:
        self.received: list[str] = []
        self._raises = raises
        self._closed = False
        self._stage: subprocess.Popen[bytes] | None = None
        self._kept: signal.Signals | None = None
        self._first_at: float | None = None

    def listening(self) -> AbstractContextManager[None]:
        """Take signals for the length of the block."""
        return taking_signals(self._take)

    @contextmanager
    def relaying_to(self, stage: subprocess.Popen[bytes]) -> Iterator[None]:
        """Signals are for this process, for the length of the block."""
        self._stage = stage
        if self._kept is not None:
            stage.send_signal(self._kept)
        try:
            yield
        finally:
            self._stage = None

    def close(self) -> None:
        """From now on signals change nothing: the command ends anyway."""
        self._closed = True

    def asked_for(self) -> float:
        """Seconds since the first SIGINT or SIGTERM; 0 without one."""
        return 0.0 if self._first_at is None else time.monotonic() - self._first_at

    def has_killed(self, code: int) -> bool:
        """Whether a process that ended with this code was killed by a signal that was handed on."""
        return code < 0 and signal.Signals(-code).name in self.received

    def _take(self, number: int, frame: FrameType | None) -> None:
        asked = signal.Signals(number)
        self.received.append(asked.name)
        repeated = asked in ENDING and self.asked_for() > _REPEAT_SECONDS
        if asked in ENDING and self._first_at is None:
            self._first_at = time.monotonic()
        if self._closed:
            return
        if self._stage is not None:
            self._hand_on(self._stage, asked, repeated)
        elif self._raises:
            raise StopRequestedError(asked.name)
        else:
            self._kept = asked

    def _hand_on(self, stage: subprocess.Popen[bytes], asked: signal.Signals, repeated: bool) -> None:
        if repeated:
            stage.kill()
        elif not _came_to_both(asked):
            stage.send_signal(asked)


def _came_to_both(asked: signal.Signals) -> bool:
    """Whether the stage has the signal already: Ctrl-C in a terminal reaches every process in its foreground."""
    try:
        return asked == signal.SIGINT and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
