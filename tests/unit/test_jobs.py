"""Commands side by side: who gets which GPUs and cores, and what a signal to their parent does; real processes."""

import json
import os
import signal
import sys
import time

import pytest

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch import jobs as jobs_module
from ivl_lightning.launch.gpus import visible_gpus
from ivl_lightning.launch.job import Job
from ivl_lightning.launch.jobs import LocalJobs

SHOW = """
import json, os, sys, time
print(json.dumps({name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}), flush=True)
deadline = time.monotonic() + 60
while not os.path.exists(sys.argv[1]) and time.monotonic() < deadline: time.sleep(0.01)
"""
SAVE_ON_REQUEST = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("listening", flush=True)
time.sleep(60)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("listening", flush=True)
time.sleep(60)
"""


def program(script):
    return (sys.executable, "-c", script)


def environment(**variables):
    """That of this process without what would limit GPUs or cores."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    }
    return kept | variables


def make(folder, number, **settings):
    run_dir = folder / str(number)
    return Job(number, (), (str(run_dir / "go"),), str(run_dir), **settings)


def shown(job):
    """What the job has printed, as soon as it has; above it stands when it was started."""
    deadline = time.monotonic() + 30
    while (text := job.log.read_text()).count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    said = text.splitlines()[1]
    return said if said == "listening" else json.loads(said)


def end(jobs, job):
    """Let a job end; its outcome."""
    (job.log.parent / "go").touch()
    (outcome,) = jobs.wait(30)
    assert outcome.job == job
    return outcome


def test_gpus_are_dealt_and_given_back(tmp_path):
    """Of a, b, c, d: a job of two gets a and b, one of one c; another of two waits until the first has ended."""
    first, second, third = make(tmp_path, 0, devices=2), make(tmp_path, 1, devices=1), make(tmp_path, 2, devices=2)
    with LocalJobs(environment=environment(CUDA_VISIBLE_DEVICES="a,b,c,d"), command=program(SHOW)) as jobs:
        jobs.start(first)
        jobs.start(second)
        assert [shown(job)["CUDA_VISIBLE_DEVICES"] for job in (first, second)] == ["a,b", "c"]
        assert not jobs.has_room(third)
        assert end(jobs, first).exit_code == 0
        assert jobs.has_room(third)
        jobs.start(third)
        assert shown(third)["CUDA_VISIBLE_DEVICES"] == "a,b"
        assert jobs.running == (second, third)
        end(jobs, third)
        end(jobs, second)


def test_a_job_that_there_would_never_be_room_for_is_refused(tmp_path):
    jobs = LocalJobs(environment=environment(CUDA_VISIBLE_DEVICES="a,b"))
    with pytest.raises(ConfigError, match=r"trainer\.devices=3 GPUs, but 2 are visible"):
        jobs.start(make(tmp_path, 0, devices=3))


@pytest.mark.parametrize(("given", "expected"), [({}, 2), ({"OMP_NUM_THREADS": "7"}, 7)])
def test_jobs_on_the_cpu_share_its_cores(given, expected, tmp_path, monkeypatch):
    """Two jobs of two processes on eight cores: two threads for each process, unless the user says otherwise."""
    monkeypatch.setattr(jobs_module, "_cores", lambda: 8)
    job = make(tmp_path, 0, processes=2)
    with LocalJobs(2, environment(**given), program(SHOW)) as jobs:
        jobs.start(job)
        assert shown(job)["OMP_NUM_THREADS"] == str(expected)
        end(jobs, job)


def test_one_job_at_a_time_has_the_machine_for_itself(tmp_path):
    first, second = make(tmp_path, 0), make(tmp_path, 1)
    with LocalJobs(environment=environment(CUDA_VISIBLE_DEVICES="a,b"), command=program(SHOW)) as jobs:
        jobs.start(first)
        assert shown(first) == {"CUDA_VISIBLE_DEVICES": "a,b", "OMP_NUM_THREADS": None}
        assert not jobs.has_room(second)
        end(jobs, first)


@pytest.mark.parametrize(("asked", "requeue"), [(signal.SIGINT, False), (signal.SIGUSR1, True)])
def test_a_signal_asks_all_jobs_to_save(asked, requeue, tmp_path):
    """They get SIGTERM whatever it was: to save, and to leave a requeue to their parent. None is started any more."""
    running = [make(tmp_path, number) for number in range(2)]
    with LocalJobs(3, environment(), program(SAVE_ON_REQUEST)) as jobs:
        for job in running:
            jobs.start(job)
            shown(job)
        os.kill(os.getpid(), asked)
        outcomes = []
        while jobs.running:
            outcomes += jobs.wait(30)
        assert [outcome.exit_code for outcome in outcomes] == [75, 75]
        assert all(outcome.stopped for outcome in outcomes)
        assert not jobs.has_room(make(tmp_path, 2))
    assert jobs.stopping
    assert jobs.wants_requeue == requeue


def test_a_second_signal_kills(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "_REPEAT_SECONDS", 0.0)
    job = make(tmp_path, 0)
    with LocalJobs(1, environment(), program(DEAF)) as jobs:
        jobs.start(job)
        shown(job)
        os.kill(os.getpid(), signal.SIGTERM)
        assert jobs.wait(0.1) == []
        os.kill(os.getpid(), signal.SIGTERM)
        (outcome,) = jobs.wait(30)
    assert outcome.exit_code == -signal.SIGKILL


def test_what_runs_at_the_end_of_the_block_is_stopped(tmp_path):
    job = make(tmp_path, 0)
    with LocalJobs(1, environment(), program(SAVE_ON_REQUEST)) as jobs:
        jobs.start(job)
        shown(job)
    assert jobs.running == ()


def test_a_second_try_is_logged_below_the_first(tmp_path):
    job = make(tmp_path, 0)
    for _ in range(2):
        with LocalJobs(1, environment(), program("print('tried')")) as jobs:
            jobs.start(job)
            jobs.wait(30)
    lines = job.log.read_text().splitlines()
    assert lines[1::2] == ["tried", "tried"]
    assert all(line.startswith("---- 20") for line in lines[::2])


@pytest.mark.parametrize(
    ("chosen", "gpus"), [("2, 5", ("2", "5")), ("GPU-a,GPU-b", ("GPU-a", "GPU-b")), ("", ()), ("0,-1,1", ("0",))]
)
def test_gpus_that_the_environment_allows(chosen, gpus):
    """As CUDA reads its variable: what stands behind a number below zero is hidden."""
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": chosen}) == gpus


def test_gpus_of_the_machine(tmp_path, monkeypatch):
    """By name: CUDA and nvidia-smi number them differently."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --query-gpu=uuid ] && printf "GPU-1\\nGPU-2\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == ("GPU-1", "GPU-2")
    program.write_text('#!/bin/sh\necho "No devices were found"\nexit 6\n')
    assert visible_gpus({}) == ()
