"""A search on this machine: what runs after what, who is stopped, what is left of it after a kill; and all at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

from ivl_lightning.cli.sweep import run_arguments, split
from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.jobs import LocalJobs
from ivl_lightning.launch.sweep import LocalSweep
from ivl_lightning.launch.sweep_file import read_sweep_file
from ivl_lightning.launch.sweep_runs import Search
from ivl_lightning.launch.sweep_state import read_state
from ivl_lightning.reporting.logged_metrics import read_metrics
from tests.commands import ROOT, environment, own_arguments, train

BASE = ("stages=[2]", "data.meta=META", "model.random_weights=true")


@pytest.fixture(scope="module", autouse=True)
def hydra_command():
    """As inside of the command: jobs are made from its overrides and from where its configuration comes from."""
    before = HydraConfig.instance().cfg
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        HydraConfig.instance().set_config(compose("local_sweep", overrides=[*BASE], return_hydra_config=True))
        yield
    HydraConfig.instance().cfg = before


def searched(folder, rates, *, count=None, base=BASE, **definition):
    path = folder / "sweep.yaml"
    whole = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"optim.lr": {"values": rates}},
        **definition,
    }
    path.write_text(yaml.safe_dump(whole))
    return LocalSweep(
        Search(
            file=read_sweep_file(str(path)),
            overrides=base,
            run_dir=str(folder / "run"),
            seed=0,
            count=count,
            read=lambda stage, metric: [value for _, value in read_metrics(stage).series(metric)],
        )
    )


def jobs(at_once=1):
    return LocalJobs(at_once, environment(), (sys.executable, "-m", "tests.sweep_job"))


def states(sweep):
    return {run.values["optim.lr"]: run.state for run in sweep.state.runs}


def test_a_search_goes_to_its_end_and_on_where_it_was_killed(tmp_path):
    """Hyperband with min_iter 1 and eta 2, four losses logged: looked at is the 3rd, lr + 1/3, of which 1.33, 0.83 and
    200.33 have the median 1.33. The best of the last run, 200.25, lies above it: it is stopped, and would never end by
    itself. A failed run is nothing to the others. What was killed is tried again with its values, what failed too; what
    has ended is not.
    """
    rates = [1.0, 13, 0.5, 200.0]
    early = {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}
    sweep = searched(tmp_path, rates, **early)
    sweep.run(jobs())
    assert list(states(sweep).items()) == [
        (1.0, "finished"),
        (13, "failed"),
        (0.5, "finished"),
        (200.0, "stopped early"),
    ]
    assert sweep.scores() == {0: 1.25, 2: 0.75}
    assert sweep.best().number == 2
    assert [sweep.results[number].state for number in range(4)] == list(states(sweep).values())
    assert "thirteen brings no luck" in sweep.results[1].what_failed()
    assert "++optim.lr=0.5 run_dir=" in sweep.search.command(sweep.best())

    # As `kill -9` leaves it: noted before it was started, and never heard of again.
    saved = json.loads((tmp_path / "run/sweep.json").read_text())
    saved["runs"][2]["state"] = "running"
    (tmp_path / "run/sweep.json").write_text(json.dumps(saved))
    logs = {number: (tmp_path / f"run/{number}/instruction_tuning/metrics.jsonl") for number in (0, 2, 3)}
    before = {number: len(log.read_text().splitlines()) for number, log in logs.items()}
    again = searched(tmp_path, rates, **early)
    again.run(jobs())
    assert states(again) == states(sweep)
    added = {number: len(log.read_text().splitlines()) - before[number] for number, log in logs.items()}
    assert added == {0: 0, 2: 4, 3: 0}
    assert (tmp_path / "run/1/job.log").read_text().count("thirteen") == 2

    with pytest.raises(ConfigError, match=r"was begun with sweep parameters=.*use another run_dir"):
        searched(tmp_path, [1.0, 2.0], **early)
    with pytest.raises(ConfigError, match=r"was begun with instruction_tuning: optim\.weight_decay=0\.01"):
        searched(tmp_path, rates, base=(*BASE, "optim.weight_decay=0.5"), **early)


def test_a_search_that_is_asked_to_stop_asks_its_runs(tmp_path):
    """SIGINT: both runs save and stop, none is begun, and none counts as ended."""
    sweep = searched(tmp_path, [200.0, 300.0, 400.0])
    started = [tmp_path / f"run/{number}/instruction_tuning/metrics.jsonl" for number in (0, 1)]

    def interrupt():
        while not all(log.is_file() and log.read_text().count("\n") == 4 for log in started):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    running = jobs(at_once=2)
    sweep.run(running)
    thread.join()
    assert running.stopping
    assert states(sweep) == {200.0: "stopped", 300.0: "stopped"}
    assert [run.ended for run in read_state(tmp_path / "run").runs] == [False, False]


def test_a_target_ends_the_search(tmp_path):
    """The second of three points, 0.5 + 1/4, is below 0.8: nothing is begun behind it."""
    sweep = searched(tmp_path, [1.0, 0.5, 0.25], metric={"name": "val/loss", "goal": "minimize", "target": 0.8})
    sweep.run(jobs())
    assert states(sweep) == {1.0: "finished", 0.5: "finished"}


def test_wrong_settings_of_a_point_leave_the_others(tmp_path):
    """Two devices contradict strategy=single. Where it is the first run, all the others may be as wrong."""
    parameters = {"optim.lr": {"values": [1.0]}, "trainer.devices": {"values": [1, 2]}}
    sweep = searched(tmp_path, [], parameters=parameters)
    sweep.run(jobs())
    assert [run.state for run in sweep.state.runs] == ["finished", "failed"]
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"optim\.lr='high'"):
        searched(tmp_path / "other", ["high"])


def test_arguments_of_the_command():
    settings, rest = split(["sweep=miniature", "optim.lr=1", "count=3"])
    assert (settings.sweep, settings.count, rest) == ("miniature", 3, ["optim.lr=1"])
    assert split(["--help"]) == (None, ["--help"])
    with pytest.raises(ConfigError, match="count=0 must be at least 1"):
        split(["sweep=a", "count=0"])
    with pytest.raises(ConfigError, match="-m is for"):
        split(["sweep=a", "-m"])


def test_what_file_and_command_line_say_together(tmp_path):
    """The command line counts, but for what is searched: a run would not get it."""
    command = ["stages=[2]", "trainer.max_steps=3"]
    file = searched(tmp_path, [1.0], command=command).search.file
    assert run_arguments(file, ["+trainer.max_steps=9"]) == ["stages=[2]", "+trainer.max_steps=9"]
    with pytest.raises(ConfigError, match=r"^objective\.goal, optim\.lr: the sweep's file says it"):
        run_arguments(file, ["++optim.lr=1", "objective.goal=maximize"])


def test_without_the_package_the_command_says_what_to_install():
    code = "import sys; sys.modules['sweeps'] = None; from ivl_lightning.cli.sweep import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "sweep=miniature"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == "error: ivl-sweep needs W&B's search: pip install 'ivl-lightning[sweeps]'\n"


@pytest.mark.soak
def test_the_command_from_a_file_to_a_summary(tmp_path):
    """A sweep of one point that holds null, a list and a nested mapping: trained, logged for W&B without a server, and
    in the summary, by a metric that no validation has.
    """
    pytest.importorskip("wandb")
    from tests.wandb_file import read_offline_run

    parameters = {
        "optim": {"parameters": {"lr": {"values": [0.001]}, "betas": {"value": [0.9, 0.95]}}},
        "trainer.gradient_clip_val": {"value": None},
    }
    definition = {
        "command": ["${program}", "stages=[2]", "logger=wandb", "${args_json}"],
        "method": "grid",
        "metric": {"name": "train/loss", "goal": "minimize"},
        "parameters": parameters,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(definition))
    own = [*own_arguments(tmp_path, steps=2), "eval.probe_rows=0", "logger=wandb_offline", f"run_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "ivl_lightning.cli.sweep", f"sweep={tmp_path}/mine.yaml", *own]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (job,) = summary["jobs"]
    assert job["state"] == "finished"
    config = yaml.safe_load((tmp_path / "run/0/instruction_tuning/config.yaml").read_text())
    assert (config["optim"]["betas"], config["trainer"]["gradient_clip_val"]) == ([0.9, 0.95], None)
    assert (config["objective"]["metric"], config["objective"]["goal"]) == ("train/loss", "minimize")
    assert f"best: job 0, train/loss = {job['score']:.4g}" in ended.stdout
    (file,) = (tmp_path / "run/0/instruction_tuning").glob("wandb/offline-run-*/run-*.wandb")
    run = read_offline_run(file)
    assert (run.group, run.name) == (f"{tmp_path}/run", "0 instruction_tuning")
    assert run.config["optim"]["lr"] == 0.001
    assert [row["train/loss"] for row in run.history if "train/loss" in row][-1] == pytest.approx(job["score"])


@pytest.mark.soak
def test_the_search_to_look_at(tmp_path):
    """`sweep=miniature` as it stands: eight runs, of which none fails; the best learned more than the first, and is the
    best by the files that its stage left.
    """
    command = [sys.executable, "-m", "ivl_lightning.cli.sweep", "sweep=miniature", f"run_dir={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(2), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    state = read_state(tmp_path)
    assert len(state.runs) == 8
    assert {run.state for run in state.runs} <= {"finished", "stopped early"}
    done = {path.parent.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/*/done.json")}
    losses = {int(number): values["scores"]["val/loss"] for number, values in done.items()}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == min(losses, key=losses.__getitem__)
    assert losses[summary["best"]] < losses[0]


@pytest.mark.soak
def test_optuna_searches_through_hydra(tmp_path):
    """Hydra's sweeper of Optuna gets each job's score; it is an extra that the development set-up leaves out."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    rates = "optim.lr=tag(log,interval(1e-4,1e-2))"
    own = [*own_arguments(tmp_path, steps=2), "data.val_rows=2", f"run_dir={tmp_path}/run"]
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=minimize"]
    ended = train("-m", *sweeper, rates, *own, "objective.metric=val/loss")
    assert ended.returncode == 0, ended.stderr
    best = yaml.safe_load((tmp_path / "run/optimization_results.yaml").read_text())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert best["best_value"] == min(job["score"] for job in summary["jobs"])
