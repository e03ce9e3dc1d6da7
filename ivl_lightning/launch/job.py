"""A command of `train.py` among others: what it is, how it ended, and its log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ivl_lightning.constants import PREEMPTED_EXIT_CODE

LOG_NAME = "job.log"
BEGIN = "---- "
"""What a line of a log begins with that stands above each try of a job."""


@dataclass(frozen=True, slots=True)
class Job:
    """One command.

    Attributes:
        number: of the job; names it for people.
        overrides: what sets it apart, as people wrote it.
        arguments: the whole command line behind `train.py`, with an explicit `run_dir`.
        run_dir: its run folder, where its log goes too.
        devices: GPUs that it takes; 0 where it runs on the CPU.
        processes: that it trains with on this machine.
    """

    number: int
    overrides: tuple[str, ...]
    arguments: tuple[str, ...]
    run_dir: str
    devices: int = 0
    processes: int = 1

    @property
    def log(self) -> Path:
        """Where it writes; what an earlier try of the same job wrote stands above."""
        return Path(self.run_dir) / LOG_NAME


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        job: that ended.
        exit_code: 0 if it has finished, 75 if it stopped on request and would go on, negative if a signal killed it.
        seconds: wall time of this try.
    """

    job: Job
    exit_code: int
    seconds: float

    @property
    def log(self) -> Path:
        """Where it wrote."""
        return self.job.log

    @property
    def stopped(self) -> bool:
        """Whether it was asked to stop, and the same command goes on."""
        return self.exit_code == PREEMPTED_EXIT_CODE


def log_lines(content: bytes) -> list[str]:
    """The lines of a part of a log, without what a progress bar has written over."""
    lines = content.decode(errors="replace").removesuffix("\n").split("\n")
    return [line.rstrip().rpartition("\r")[2] for line in lines] if content else []
