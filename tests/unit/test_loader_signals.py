"""What loader processes do with the signals that end a run."""

import os
import signal
import subprocess
import time

import psutil
from torch.utils.data import DataLoader, Dataset

from ivl_lightning.data.loader_signals import leave_signals_to_parent


class Pids(Dataset):
    """Each row is the id of the process that reads it."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.05)
        return os.getpid()


def signal_from_elsewhere(pid, number):
    subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)


def test_signals_of_others_are_ignored_and_the_parent_s_end_it():
    """All eight rows come although the process is sent what Slurm and Ctrl-C send; then its parent ends it."""
    loader = DataLoader(Pids(), batch_size=None, num_workers=1, worker_init_fn=leave_signals_to_parent)
    rows = iter(loader)
    worker = next(rows)
    assert worker != os.getpid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        signal_from_elsewhere(worker, number)
    assert list(rows) == [worker] * 7

    process = psutil.Process(next(rows := iter(loader)))
    signal_from_elsewhere(process.pid, signal.SIGTERM)
    assert process.is_running()
    rows._workers[0].terminate()
    rows._workers[0].join(10)
    assert rows._workers[0].exitcode == 0
