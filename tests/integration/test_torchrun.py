"""A chain of stages on several launching processes: `torchrun train.py`, real processes on CPU."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ivl_lightning.checkpoints.complete import newest_complete, steps_of
from tests.commands import ROOT, environment, own_arguments

STAGES = ("mlp_warmup", "vit_incremental", "instruction_tuning")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Arguments on a small model: 2 steps of each stage, but 30 of the second, which is to be killed."""
    arguments = own_arguments(tmp_path_factory.mktemp("own"), steps=2)
    steps = zip(STAGES, (2, 30, 2), strict=True)
    return [
        *(argument for argument in arguments if not argument.startswith(("stages=", "trainer.max_steps="))),
        *(f"++recipe.stages.{stage}.trainer.max_steps={count}" for stage, count in steps),
        "trainer.checkpoint_every_n_steps=5",
        "trainer.progress_bar=false",
    ]


def start(*arguments, starter=("--standalone", "--nproc_per_node=2")):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *starter, "train.py", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(folder, pattern, process):
    """The run folder in which the second stage has a complete checkpoint."""
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        for run in folder.glob(pattern):
            if newest_complete(run / STAGES[1] / "checkpoints") is not None:
                return run
        time.sleep(0.02)


def finished(run, stages):
    return [json.loads((run / stage / "done.json").read_text()) for stage in stages]


def processes_of(process, program, rank):
    """Below a torchrun: those that run a program as a rank."""
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if program in " ".join(child.cmdline()) and child.environ().get("RANK") == str(rank)
    ]


def test_a_stage_of_two_ranks(own, tmp_path):
    """The run folder's name is from the clock: both ranks must take rank 0's."""
    name = "${now:%H-%M-%S-%f}"
    process = start(*own, "strategy=ddp", "trainer.devices=2", "stages=[1]", f"run_dir='{tmp_path}/{name}'")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    (run,) = tmp_path.iterdir()
    assert output.count(f"report: {run}/report.html") == 1
    assert finished(run, STAGES[:1])[0]["steps"] == 2


def test_a_mistake_is_told_once(own, tmp_path):
    """Two ranks, and settings for one."""
    process = start(*own, "stages=[2]", f"run_dir={tmp_path}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    told = "torchrun started 1 x 2 processes (nodes x processes), but trainer.devices=1"
    assert errors.count(told) == 1
    assert errors.count("add trainer.devices=2 trainer.num_nodes=1 strategy=ddp") == 1
    assert not (tmp_path / STAGES[2]).exists()


@pytest.mark.soak
def test_a_chain_of_two_ranks_is_killed_and_goes_on(own, tmp_path):
    """The first start makes its run folder's name from the clock: both ranks must take rank 0's.

    kill -9 of rank 1's second stage ends rank 0's, which would wait for it, and the command. The second start skips the
    finished stage and goes on from the checkpoint that rank 0 has found.
    """
    ranks = ("strategy=ddp", "trainer.devices=2", "stages=[1,1.5]")
    process = start(*own, *ranks, f"run_dir='{tmp_path}/${{now:%H-%M-%S-%f}}'")
    run = wait_for_checkpoint(tmp_path, "*", process)
    assert [path.name for path in tmp_path.iterdir()] == [run.name]
    (mine,), (other,) = (processes_of(process, "ivl_lightning.cli.stage", rank) for rank in (0, 1))
    os.kill(other.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "failed first, killed by signal 9" in errors
    assert "error: stage vit_incremental failed with exit code 137; later stages were not started" in errors
    assert not mine.is_running()
    assert not (run / STAGES[1] / "done.json").exists()
    saved = steps_of(newest_complete(run / STAGES[1] / "checkpoints"))

    process = start(*own, *ranks, f"run_dir={run}")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    assert output.count("mlp_warmup is finished, skipped") == 1
    assert output.count(f"goes on behind step {saved}") == 1
    assert output.count(f"report: {run}/report.html") == 1
    first, second = finished(run, STAGES[:2])
    assert (first["steps"], second["steps"]) == (2, 30)
    assert second["input_weights"] == first["output_weights"]


@pytest.mark.soak
def test_a_launching_process_that_is_killed_takes_the_run_along(own, tmp_path):
    """kill -9 of rank 1's launching process: its stage goes with it, and the others end."""
    process = start(*own, "stages=[1,1.5]", "strategy=ddp", "trainer.devices=2", f"run_dir={tmp_path}/run")
    wait_for_checkpoint(tmp_path, "run", process)
    (mine,), (other,) = (processes_of(process, "ivl_lightning.cli.stage", rank) for rank in (0, 1))
    os.kill(other.ppid(), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: ranks [1] do not answer any more" in errors
    assert "stage vit_incremental failed" in errors
    assert not mine.is_running()
    assert not other.is_running()


@pytest.mark.soak
def test_three_stages_are_stopped_by_sigterm_and_go_on(own, tmp_path):
    """torchrun's own exit code is 1 whatever its processes end with."""
    arguments = (*own, "stages=[1,1.5,2]", "strategy=fsdp", "trainer.devices=2", f"run_dir={tmp_path}/run")
    process = start(*arguments)
    run = wait_for_checkpoint(tmp_path, "run", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("stage vit_incremental stopped on request after a checkpoint; the same command goes on") == 1
    saved = steps_of(newest_complete(run / STAGES[1] / "checkpoints"))
    process = start(*arguments)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    assert f"goes on behind step {saved}" in output
    done = finished(run, STAGES)
    assert [entry["steps"] for entry in done] == [2, 30, 2]
    assert done[2]["input_weights"] == done[1]["output_weights"]


@pytest.mark.soak
def test_two_nodes_of_two_ranks(own, tmp_path):
    """Two torchruns on loopback: one run, shards in a node and copies across; rank 0's node alone prints."""
    shared = ("--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29577")
    settings = ("strategy=hsdp", "trainer.devices=2", "trainer.num_nodes=2", "data.packs_per_step=4")
    arguments = (*own, "stages=[1,1.5,2]", *settings, f"run_dir={tmp_path}/run")
    processes = [start(*arguments, starter=(*shared, f"--local-addr={host}")) for host in ("localhost", "127.0.0.1")]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [errors[-2000:] for _, errors in outputs]
    assert [entry["steps"] for entry in finished(tmp_path / "run", STAGES)] == [2, 30, 2]
    assert sorted(output.count("report: ") for output, _ in outputs) == [0, 1]
