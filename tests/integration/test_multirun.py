"""`-m`: each job a process of its own with ranks, folder and log; failures, stops and kills of its jobs."""

import csv
import json
import re
import signal
import subprocess
import time

import psutil
import pytest

from ivl_lightning.checkpoints.complete import newest_complete
from tests.commands import ROOT, command, environment, logged, own_arguments, train

STAGE = "instruction_tuning"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Arguments of two ranks that train one step on a model and data of one's own, with rows held back."""
    return [
        *own_arguments(tmp_path_factory.mktemp("own"), steps=1),
        "data.val_rows=4",
        "eval.probe_rows=0",
        "strategy=ddp",
        "trainer.devices=2",
        "trainer.progress_bar=false",
        "launcher=local",
        "launcher.jobs=2",
    ]


@pytest.fixture
def model(own):
    return next(argument.partition("=")[2] for argument in own if argument.startswith("model.path="))


def losses(run):
    return logged(run / STAGE, "train/loss")


def test_jobs_of_two_ranks_and_one_that_fails(own, model, tmp_path):
    """Three jobs, two at a time, one of them without weights. The others train the same weights with the same seed.

    So they have the same losses, if no job disturbs another one's ranks.
    """
    paths = (model, f"{model}/.", "/not/there")
    result = train("-m", *own, f"model.path={','.join(paths)}", f"run_dir={tmp_path}")
    assert result.returncode == 1, result.stderr
    for job, path in enumerate(paths[:2]):
        stage = tmp_path / str(job) / STAGE
        assert json.loads((stage / "done.json").read_text())["steps"] == 1
        assert f"  path: {path}\n" in (stage / "config.yaml").read_text()
        assert "MEMBER: 2/2" in (tmp_path / str(job) / "job.log").read_text()
    assert losses(tmp_path / "0") == losses(tmp_path / "1") != {}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [job["state"] for job in summary["jobs"]] == ["finished", "finished", "failed"]
    assert [job["exit_code"] for job in summary["jobs"]] == [0, 0, 1]
    assert [job["overrides"] for job in summary["jobs"]] == [{"model.path": path} for path in paths]
    assert summary["metric"] == "val/score"
    done = json.loads((tmp_path / f"1/{STAGE}/done.json").read_text())
    assert summary["jobs"][1]["score"] == done["scores"]["val/score"]
    assert summary["jobs"][2]["error"].startswith("error: /not/there: there is no such folder")
    assert "error: job 2 model.path=/not/there failed with exit code 1" in result.stderr
    assert f"(its log is {tmp_path}/2/job.log)" in result.stderr
    page = (tmp_path / "summary.html").read_text()
    assert 'href="0/report.html"' in page
    assert (tmp_path / "0/report.html").is_file()
    assert "python train.py -m " in page


def test_a_wrong_setting_of_one_job_is_found_before_any_starts(own, tmp_path):
    result = train("-m", *own, "optim.lr=1e-5,2e-5", "optim.warmup_ratio=0.1,2", f"run_dir={tmp_path}/run")
    assert result.returncode == 1
    assert "error: job 1 (optim.lr=1e-05 optim.warmup_ratio=2): stage instruction_tuning:" in result.stderr
    assert "job 3 (optim.lr=2e-05 optim.warmup_ratio=2): stage instruction_tuning:" in result.stderr
    assert "job 0" not in result.stderr
    assert not list((tmp_path / "run").glob("*/"))


# ---- minutes


@pytest.fixture(scope="module")
def long(own):
    """The same, with so many steps that a job can be met while it trains."""
    return [*own, "trainer.max_steps=30", "trainer.checkpoint_every_n_steps=2"]


def start(*arguments):
    return subprocess.Popen(
        command("-m", *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoints(process, *runs):
    deadline = time.monotonic() + 300
    while not all(newest_complete(run / STAGE / "checkpoints") for run in runs):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(folder):
    return [one for one in psutil.process_iter() if any(f"{folder}/" in part for part in command_line(one))]


def command_line(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.soak
def test_four_jobs_of_two_ranks_that_are_stopped_and_go_on(long, tmp_path):
    """SIGTERM while two of four train: both save, exit code 75. The same command goes on: three finish.

    The fourth, whose rows are all too long, fails and says so. Losses are those of a run that nobody stopped.
    """
    arguments = [*long, "data.max_tokens=420,430,440,10", f"run_dir={tmp_path}/run"]
    process = start(*arguments)
    wait_for_checkpoints(process, tmp_path / "run/0", tmp_path / "run/1")
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "jobs stopped on request; the same command goes on" in errors
    states = [job["state"] for job in json.loads((tmp_path / "run/summary.json").read_text())["jobs"]]
    assert states == ["stopped", "stopped", "waiting", "waiting"], shown
    assert not processes_of(tmp_path)
    again = train("-m", *arguments, timeout=900)
    assert again.returncode == 1, again.stderr
    assert re.search(r"    error( on rank 1)?: \d+ of \d+ rows cannot be used", again.stderr), again.stderr
    assert "goes on behind step" in (tmp_path / "run/0/job.log").read_text()
    with (tmp_path / "run/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished", "finished", "finished", "failed"]
    assert [row["data.max_tokens"] for row in rows] == ["420", "430", "440", "10"]
    alone = train(*long, "data.max_tokens=420", f"run_dir={tmp_path}/alone", timeout=600)
    assert alone.returncode == 0, alone.stderr
    assert losses(tmp_path / "run/0") == losses(tmp_path / "alone")
    # What is finished is not started again.
    third = train("-m", *long, "data.max_tokens=420,430,440", f"run_dir={tmp_path}/run")
    assert third.returncode == 0
    assert third.stdout.count("is finished, skipped") == 3


@pytest.mark.soak
def test_jobs_do_not_outlive_a_command_that_is_killed(long, tmp_path):
    process = start(*long, "optim.lr=1e-5,2e-5", f"run_dir={tmp_path}/run")
    wait_for_checkpoints(process, tmp_path / "run/0", tmp_path / "run/1")
    assert len(processes_of(tmp_path / "run")) >= 6
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while processes_of(tmp_path / "run"):
        assert time.monotonic() < deadline, [one.cmdline() for one in processes_of(tmp_path / "run")]
        time.sleep(0.1)


@pytest.mark.soak
def test_one_after_the_other_shows_what_a_job_writes(own, tmp_path):
    """Without `launcher=local`: the table of stages of each job stands in the terminal, and in its log."""
    result = train("-m", *own, "launcher=none", "optim.lr=1e-5,2e-5", f"run_dir={tmp_path}", timeout=600)
    assert result.returncode == 0, result.stderr
    ends = [result.stdout.index(f"job {job} finished") for job in range(2)]
    tables = [place for place in range(len(result.stdout)) if result.stdout.startswith(f"report: {tmp_path}", place)]
    assert tables[0] < ends[0] < result.stdout.index(f"job 1 optim.lr=2e-05 -> {tmp_path}/1") < tables[1] < ends[1]
    assert "report: " in (tmp_path / "0/job.log").read_text()
