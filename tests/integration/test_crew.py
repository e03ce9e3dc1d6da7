"""Launching processes and their signals, with small scripts in the place of the stages."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT

# What the stand-ins do, by the name of the stage's folder.
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
rank = int(os.environ.get("RANK", "0"))
def stop(number, frame):
    (folder / f"asked.{rank}").write_text(signal.Signals(number).name)
    (folder / "stopped").touch()
if folder.name == "listens":
    # As the stage does: whichever rank is asked, all stop behind the same step.
    signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGUSR1, stop)
if folder.name == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if folder.name == "bound":
    from ivl_lightning.launch.stage_process import end_with_parent
    end_with_parent()
(folder / f"started.{rank}").write_text(json.dumps({**os.environ, "PID": os.getpid()}))
if folder.name == "quick":
    sys.exit(0)
if folder.name == "breaks" and rank == 1:
    sys.exit(7)
for _ in range(600):
    time.sleep(0.1)
    if (folder / "stopped").exists():
        sys.exit(75)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return path


def start(script, *names, rank=0, world=1, port=0):
    folders = [script.parent / name for name in names]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if world > 1:
        environment |= {
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.launching", script, *folders],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(script, *names):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(script, *names, rank=rank, world=2, port=port) for rank in range(2)]


def environment_of(script, name, rank=0):
    """Of the stand-in, which is waited for."""
    path = script.parent / name / f"started.{rank}"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return json.loads(path.read_text())


def is_gone(pid):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            return True
        time.sleep(0.05)
    return False


def test_one_rank_that_fails_ends_the_others(script):
    """Rank 1 of the second stage exits with 7. Rank 0's would run for a minute: it is ended, and all exit with 7.

    Each stage had a port of its own and nothing of the meeting point's.
    """
    processes = start_two(script, "quick", "breaks")
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [7, 7], outputs
    assert json.loads(outputs[0][0]) == {"codes": [0, 7], "requeue": False}
    assert "error: rank 1 on " in outputs[0][1]
    assert "failed first, with exit code 7" in outputs[0][1]
    assert outputs[1] == ("", "")
    stages = [[environment_of(script, name, rank) for rank in range(2)] for name in ("quick", "breaks")]
    first, second = ([int(stage["MASTER_PORT"]) for stage in ranks] for ranks in stages)
    assert second == [port + 1 for port in first]
    assert [stage["RANK"] for stage in stages[0]] == ["0", "1"]
    assert not any("TORCHELASTIC_USE_AGENT_STORE" in stage for ranks in stages for stage in ranks)
    assert is_gone(stages[1][0]["PID"])


def test_a_signal_to_any_rank_stops_all_and_asks_for_the_queue(script):
    """SIGUSR1 to the launching process of rank 1 alone: both stages exit with 75, and rank 0 knows why."""
    processes = start_two(script, "listens")
    for rank in range(2):
        environment_of(script, "listens", rank)
    processes[1].send_signal(signal.SIGUSR1)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    assert json.loads(outputs[0][0]) == {"codes": [75], "requeue": True}
    assert (script.parent / "listens/asked.1").read_text() == "SIGUSR1"
    assert not (script.parent / "listens/asked.0").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_process_alone_reaches_its_stage(script, number):
    """Only the signal before the end of the time asks for the queue: whoever sends SIGTERM wants an end."""
    process = start(script, "listens")
    environment_of(script, "listens")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert json.loads(output) == {"codes": [75], "requeue": number == signal.SIGUSR1}
    assert (script.parent / "listens/asked.0").read_text() == number.name


def test_a_stage_that_does_not_listen_yet_has_nothing_to_save(script):
    """The signal's own action kills it: a stop on request all the same."""
    process = start(script, "anything")
    environment_of(script, "anything")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert json.loads(output) == {"codes": [75], "requeue": True}


def test_a_second_request_kills(script):
    """A stage that ignores SIGTERM: of two at once the second is the same request, a later one kills (128 + 9)."""
    process = start(script, "deaf")
    environment_of(script, "deaf")
    for pause in (0.2, 1.5):
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert json.loads(output) == {"codes": [137], "requeue": False}


def test_a_stage_does_not_outlive_its_launching_process(script):
    process = start(script, "bound")
    stage = environment_of(script, "bound")["PID"]
    process.kill()
    process.communicate()
    assert is_gone(stage)
