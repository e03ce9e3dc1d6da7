"""Loader processes hear no signal but their parent's: whoever stops a run signals all processes of it at once."""

from __future__ import annotations

import os
import signal
import threading


def leave_signals_to_parent(worker: int) -> None:
    """In a loader process: let the training process alone decide what a signal means.

    Slurm and torchrun signal whole process groups. A training process that is asked to stop still needs the batches of
    the step it is in, but torch's loader processes end on SIGTERM, and a step without batches is a crash. They must
    end on their parent's SIGTERM, though, or it would wait for them at its own end.

    Args:
        worker: its number; a `worker_init_fn` is given it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Held back from every thread, so that the one that waits for it learns who has sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
