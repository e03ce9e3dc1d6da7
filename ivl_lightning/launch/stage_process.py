"""The process of one rank of a stage: started, watched, ended; it does not outlive the launching process."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

STAGE_COMMAND = (sys.executable, "-m", "ivl_lightning.cli.stage")
# How long a stage may go on by itself when another rank's has failed: mostly it fails too, with a message of its own.
# Then it is asked to end, and killed at last.
OWN_END_SECONDS, TERM_SECONDS = 5.0, 10.0
_LOOK_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def start_stage(command: Sequence[str], folder: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the process of the stage that lies in `folder`; it writes to the same terminal."""
    return subprocess.Popen([*command, folder], env=dict(environment))


def wait_for_stage(process: subprocess.Popen[bytes], has_failed_elsewhere: Callable[[], bool]) -> int:
    """Exit code of a stage's process; negative: killed by this signal.

    Args:
        process: of the stage.
        has_failed_elsewhere: whether another rank's has failed, which ends this one.
    """
    while not _ends_within(process, _LOOK_SECONDS):
        if has_failed_elsewhere():
            end_stage(process)
    return process.returncode


def end_stage(process: subprocess.Popen[bytes]) -> None:
    """End it: by itself, asked, or killed."""
    if _ends_within(process, OWN_END_SECONDS):
        return
    process.terminate()
    if _ends_within(process, TERM_SECONDS):
        return
    process.kill()
    process.wait()


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_with_parent() -> None:
    """Let Linux kill this process once its parent is gone, `kill -9` included.

    A stage that trains on without its launching process would write into a run that the same command has begun again.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
