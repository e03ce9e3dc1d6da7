"""A real Slurm of one node on loopback, all of it in one folder: munged, slurmctld and slurmd of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sacct")
# Where Debian keeps daemons, which need not be on the path.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_START_SECONDS = 30


def why_not() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"not installed here: {', '.join(missing)} (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "slurmd starts tasks as root only"
    return None


@contextmanager
def slurm_node(folder: Path) -> Iterator[dict[str, str]]:
    """A node with two CPUs that takes jobs; the environment in which its commands work.

    The daemons stop with the block, whatever still runs on the node with them.
    """
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(_write_settings(folder))}
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"):
        environment.pop(name, None)
    with ExitStack() as stack:
        stack.enter_context(_daemon(folder, "munged", *_munge_options(folder)))
        _wait_for(folder / "munge.socket")
        stack.enter_context(_daemon(folder, "slurmctld", "-D", environment=environment))
        stack.enter_context(_daemon(folder, "slurmd", "-D", "-N", "localhost", environment=environment))
        _wait_until_idle(environment)
        yield environment
        subprocess.run(
            ["scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root"], env=environment, check=False
        )


def _munge_options(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    files = {"key-file": key, "socket": folder / "munge.socket"}
    files |= {f"{kind}-file": folder / f"munge.{kind}" for kind in ("pid", "log", "seed")}
    # --force: it would rather not run as root in a folder of anybody's.
    return ["--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())]


def _write_settings(folder: Path) -> Path:
    """slurm.conf: no cgroups, no database, every path in `folder`."""
    controller, node = _free_ports(2)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    settings = {
        "ClusterName": "loopback",
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.socket'}",
        "CredType": "cred/munge",
        "SlurmctldPort": controller,
        "SlurmdPort": node,
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "ReturnToService": 2,
        "MpiDefault": "none",
        "KillWait": 5,
        "RequeueExit": "",
        "SchedulerParameters": "sched_interval=1,requeue_delay=1",
    }
    nodes = f"NodeName=localhost NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000"
    partition = "PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP"
    lines = [f"{name}={value}" for name, value in settings.items() if value != ""]
    path = folder / "slurm.conf"
    path.write_text("\n".join([*lines, nodes, partition]) + "\n", encoding="utf-8")
    return path


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def _daemon(folder: Path, *command: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    program = shutil.which(command[0], path=_PATH)
    assert program is not None
    with (folder / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(
            [program, *command[1:]], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def _wait_until_idle(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    command = ["sinfo", "--noheader", "--format=%T"]
    while True:
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if shown.stdout.strip() == "idle":
            return
        assert time.monotonic() < deadline, f"the node is not idle: {shown.stdout}{shown.stderr}"
        time.sleep(0.2)
