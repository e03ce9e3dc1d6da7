"""Runs on a real Slurm of one node: srun, `launcher=slurm`, and the signal before the end of a job's time."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ivl_lightning.checkpoints.complete import newest_complete
from tests.commands import ROOT, environment, logged, own_arguments
from tests.slurm_node import slurm_node, why_not

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(why_not() is not None, reason=f"no Slurm can be started here: {why_not()}"),
]
STAGES = ("mlp_warmup", "instruction_tuning")
STEPS = (2, 40)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_node(tmp_path_factory.mktemp("slurm")) as variables:
        yield environment() | variables


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Arguments of two stages on two processes, with a loader process each."""
    arguments = own_arguments(tmp_path_factory.mktemp("own"), steps=2)
    return [
        *(argument for argument in arguments if not argument.startswith(("stages=", "trainer.max_steps="))),
        "stages=[1,2]",
        *(f"++recipe.stages.{stage}.trainer.max_steps={steps}" for stage, steps in zip(STAGES, STEPS, strict=True)),
        "trainer.checkpoint_every_n_steps=10",
        "trainer.progress_bar=false",
        "data.num_workers=1",
        "strategy=ddp",
        "trainer.devices=2",
        "stage.drop_path_rate=0.1",
    ]


@pytest.fixture(scope="module")
def reference(own, slurm, tmp_path_factory):
    """Losses of the second stage, step by step, of a job of srun that nobody disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    script = folder / "job.sh"
    command = shlex.join([sys.executable, "train.py", *own, f"run_dir={folder}/run"])
    script.write_text(f"#!/bin/bash\nsrun --wait=60 {command}\n")
    submitted = slurm_command(slurm, "sbatch", "--wait", "--ntasks=2", f"--output={folder}/job.log", script)
    log = (folder / "job.log").read_text()
    assert submitted.returncode == 0, log
    assert log.count("report: ") == 1
    assert [steps_done(folder / "run", stage) for stage in STAGES] == list(STEPS)
    return losses(folder / "run")


def slurm_command(variables, *command):
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def steps_done(run, stage):
    return json.loads((run / stage / "done.json").read_text())["steps"]


def losses(run):
    """Step -> loss of the second stage as written, the last one where a step was logged twice."""
    return logged(run / STAGES[1], "train/loss")


def submit(variables, *arguments):
    """Job id of a command with `launcher=slurm`, on CPU."""
    own = ("launcher=slurm", "launcher.gpus_per_node=0", "launcher.time_minutes=30")
    result = slurm_command(variables, sys.executable, "train.py", *arguments, *own)
    assert result.returncode == 0, result.stderr
    return re.search(r"job (\d+): 1 nodes with 2 processes each, 30 minutes", result.stdout)[1]


def state_of(variables, job):
    shown = slurm_command(variables, "scontrol", "show", "job", "--oneliner", job).stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def wait_for(happened, log):
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)


def wait_for_end(variables, job, log):
    on_its_way = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    wait_for(lambda: state_of(variables, job)["JobState"] not in on_its_way, log)
    return state_of(variables, job)


def test_a_script_without_srun_is_one_process(own, slurm, tmp_path):
    """It asks for two tasks, so Slurm sets their number and the rank 0; nobody has started a second one."""
    script = tmp_path / "job.sh"
    settings = ("strategy=single", "trainer.devices=1", "stages=[1]", f"run_dir={tmp_path}/run")
    script.write_text(f"#!/bin/bash\n{shlex.join([sys.executable, 'train.py', *own, *settings])}\n")
    result = slurm_command(slurm, "sbatch", "--wait", "--ntasks=2", f"--output={tmp_path}/job.log", script)
    assert result.returncode == 0, (tmp_path / "job.log").read_text()
    assert steps_done(tmp_path / "run", STAGES[0]) == 2


def test_a_dry_run_submits_nothing(own, slurm, tmp_path):
    result = slurm_command(
        slurm, sys.executable, "train.py", *own, "launcher=slurm", "dry_run=true", f"run_dir={tmp_path}"
    )
    assert result.returncode == 0, result.stderr
    assert "nothing is made, started or written" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_job_saves_before_its_time_is_over_and_goes_on(own, slurm, reference, tmp_path):
    """SIGUSR1 in the second stage, as Slurm sends it: a checkpoint, back to the queue, the rest.

    The losses of all steps are, digit by digit, those of the job that nobody disturbed.
    """
    run = tmp_path / "run"
    job = submit(slurm, *own, f"run_dir={run}")
    log = run / f"slurm/{job}_0_log.out"
    wait_for(lambda: newest_complete(run / STAGES[1] / "checkpoints") is not None, log)
    slurm_command(slurm, "scancel", "--signal=USR1", job)
    wait_for(lambda: (state := state_of(slurm, job))["JobState"] == "PENDING" and state["Restarts"] == "1", log)
    # Slurm lets a requeued job wait for two minutes.
    slurm_command(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")
    end = wait_for_end(slurm, job, log)
    told = log.read_text()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), told
    assert f"job {job} is requeued" in told
    assert "mlp_warmup is finished, skipped" in told
    stopped = int(re.search(r"goes on behind step (\d+)", told)[1])
    assert 10 <= stopped < STEPS[1]
    assert [steps_done(run, stage) for stage in STAGES] == list(STEPS)
    assert sorted(reference) == list(range(STEPS[1]))
    assert losses(run) == reference


def test_a_job_that_is_asked_to_end_saves_and_is_not_requeued(own, slurm, tmp_path):
    """SIGTERM: exit code 75, and the same command goes on."""
    run = tmp_path / "run"
    job = submit(slurm, *own, f"run_dir={run}")
    log = run / f"slurm/{job}_0_log.out"
    wait_for(lambda: newest_complete(run / STAGES[1] / "checkpoints") is not None, log)
    slurm_command(slurm, "scancel", "--signal=TERM", job)
    end = wait_for_end(slurm, job, log)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "75:0", "0"), log.read_text()
    assert "stopped on request after a checkpoint; the same command goes on" in log.read_text()
    assert newest_complete(run / STAGES[1] / "checkpoints") is not None


def test_a_multirun_submits_its_jobs_and_waits_for_them(own, slurm, tmp_path):
    """Three jobs on a node that takes one at a time, the last without weights. Ctrl-C ends the waiting, not the jobs.

    The same command finds them again and submits nothing; once more, and it tries what has failed.
    """
    model = next(argument.partition("=")[2] for argument in own if argument.startswith("model.path="))
    swept = f"model.path={model},{model}/.,/not/there"
    arguments = ("-m", *own, swept, "stages=[1]", "launcher=slurm", "launcher.gpus_per_node=0", f"run_dir={tmp_path}")
    first = subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, env=slurm, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: all((tmp_path / f"{job}/slurm_job.json").is_file() for job in range(3)), tmp_path / "none")
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    jobs = [json.loads((tmp_path / f"{job}/slurm_job.json").read_text())["id"] for job in range(3)]
    assert first.returncode == 75, told
    assert f"scancel {' '.join(jobs)}" in told
    second = slurm_command(slurm, sys.executable, "train.py", *arguments)
    assert second.returncode == 1, second.stderr
    assert [f"(Slurm job {job})" in second.stdout for job in jobs] == [True, True, True]
    assert "job 2 model.path=/not/there failed with exit code 1\n    error: /not/there: there is no" in second.stderr
    assert [steps_done(tmp_path / str(job), STAGES[0]) for job in range(2)] == [2, 2]
    third = slurm_command(slurm, sys.executable, "train.py", *arguments)
    assert third.stdout.count("is finished, skipped") == 2
    assert third.stdout.count("(Slurm job ") == 1
    states = [job["state"] for job in json.loads((tmp_path / "summary.json").read_text())["jobs"]]
    assert states == ["finished", "finished", "failed"]


def test_one_task_that_is_killed_ends_the_job(own, slurm, tmp_path):
    run = tmp_path / "run"
    job = submit(slurm, *own, f"run_dir={run}")
    log = run / f"slurm/{job}_0_log.out"
    wait_for(lambda: newest_complete(run / STAGES[1] / "checkpoints") is not None, log)
    (stage,) = [process for process in stages_of(run) if process.environ()["RANK"] == "1"]
    stage.kill()
    end = wait_for_end(slurm, job, log)
    assert end["JobState"] == "FAILED"
    assert "failed first, killed by signal 9" in log.read_text()


def stages_of(run):
    """The processes of the run's stages, without those that load data for them."""
    found = [process for process in psutil.process_iter() if f"ivl_lightning.cli.stage {run}" in command_of(process)]
    return [process for process in found if process.parent() not in found]


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
