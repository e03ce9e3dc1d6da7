"""One command as one or many processes: each runs its rank of a stage as a child, all start and end together."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ivl_lightning.constants import PREEMPTED_EXIT_CODE
from ivl_lightning.launch.meeting import Ended, Meeting, Order
from ivl_lightning.launch.ranks import Ranks
from ivl_lightning.launch.signals import REQUEUE_SIGNAL, SignalRelay, shell_code
from ivl_lightning.launch.stage_process import (
    OWN_END_SECONDS,
    STAGE_COMMAND,
    TERM_SECONDS,
    end_stage,
    start_stage,
    wait_for_stage,
)

# How long others that were asked to stop wait for rank 0 to say so.
_ORDER_SECONDS = 10.0


class Crew:
    """The launching processes of a command, seen from one of them.

    Rank 0 alone composes, prepares, decides and prints; the others wait for its orders.

    Args:
        ranks: that were started, and which this process is.
        command: what a stage is run with; its folder comes last.

    Attributes:
        ranks: as given.
    """

    def __init__(self, ranks: Ranks | None = None, command: Sequence[str] = STAGE_COMMAND) -> None:
        self.ranks = Ranks() if ranks is None else ranks
        self._command = command
        self._relay = SignalRelay(raises=self.ranks.rank == 0)
        self._started = 0
        self._ends: list[Ended] = []
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._meeting = Meeting(self.ranks, attempt) if self.ranks.world_size > 1 else None

    @property
    def wants_requeue(self) -> bool:
        """Whether some rank was asked to stop by the signal that a scheduler sends before the end, and by no other."""
        signals = {*self._relay.received, *(name for ended in self._ends for name in ended.signals)}
        return signals == {REQUEUE_SIGNAL.name}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals to this process for the length of the block."""
        with self._relay.listening():
            yield

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0: the others end with the block, with the exit code that this process ends with."""
        code = 1
        try:
            yield
            code = 0
        except SystemExit as end:
            # As Python does: a text is a message, and nothing is no fault.
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            raise
        finally:
            self._dismiss(code)

    def run(self, folder: Path) -> int:
        """Rank 0: run a stage on all ranks; the exit code of the first that failed, else 75 if one was asked to stop.

        Args:
            folder: of the stage; its config.yaml is written.
        """
        if self._meeting is None:
            return shell_code(self._run_own(str(folder)).code)
        self._meeting.give(Order(folder=str(folder)))
        self._run_own(str(folder))
        self._ends = self._meeting.ends()
        failure = self._meeting.failure()
        if failure is None:
            return max(ended.code for ended in self._ends)
        # Those that were ended for it say so; those that cannot any more are not waited for.
        self._ends = self._meeting.ends(OWN_END_SECONDS + TERM_SECONDS)
        silent = {*range(self.ranks.world_size)} - {ended.rank for ended in self._ends}
        if silent:
            print(f"error: ranks {sorted(silent)} do not answer any more", file=sys.stderr)
        if failure.code != PREEMPTED_EXIT_CODE:
            print(f"error: rank {failure.rank} on {failure.host} failed first, {_how(failure.code)}", file=sys.stderr)
        # A stop on request is one that all ranks agree on.
        return 1 if silent and failure.code == PREEMPTED_EXIT_CODE else shell_code(failure.code)

    def follow(self) -> int:
        """Another rank: do as rank 0 says until it ends the command; returns the exit code.

        Raises:
            LostRankError: rank 0 is gone.
        """
        assert self._meeting is not None, "there is nobody to follow"
        while True:
            order = self._meeting.take(lambda: self._relay.asked_for() > _ORDER_SECONDS)
            if order is None:
                return PREEMPTED_EXIT_CODE
            if order.folder is None:
                self._relay.close()
                self._meeting.part()
                return order.exit_code
            self._run_own(order.folder)

    def _dismiss(self, exit_code: int) -> None:
        # The first that ends makes torchrun send SIGTERM to the others.
        self._relay.close()
        if self._meeting is not None:
            self._meeting.give(Order(exit_code=exit_code))
            self._meeting.part()

    def _run_own(self, folder: str) -> Ended:
        environment = self.ranks.stage_environment(os.environ, self._started)
        self._started += 1
        process = start_stage(self._command, folder, environment)
        with self._relay.relaying_to(process):
            try:
                code = wait_for_stage(process, self._has_failure)
            except BaseException:
                end_stage(process)
                raise
        unheard = self._relay.has_killed(code)
        if unheard:
            # The signal came before the stage listened, or when it had finished training: nothing is lost.
            code = PREEMPTED_EXIT_CODE
        ended = Ended(self.ranks.rank, code, self._relay.received)
        if self._meeting is not None:
            self._meeting.report(ended, failed=unheard or code not in (0, PREEMPTED_EXIT_CODE))
        return ended

    def _has_failure(self) -> bool:
        return self._meeting is not None and self._meeting.failure() is not None


def _how(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"killed by signal {-code}"
