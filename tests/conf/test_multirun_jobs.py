"""Jobs of a multirun before they start: what sets them apart, what they take, what is refused."""

import io
import json
from dataclasses import asdict

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.finished import Finished, deciding_settings
from ivl_lightning.launch.job_progress import JobProgress
from ivl_lightning.launch.multirun import Multirun
from ivl_lightning.launch.overrides import with_job_launcher
from ivl_lightning.launch.planned_jobs import plan_jobs, stage_seconds
from ivl_lightning.launch.ranks import Ranks

OWN = ("recipe=none", "model=custom", "model.path=MODEL", "data.meta=META", "data.packs_per_step=8", "stages=[1,2]")
STAGES = ("mlp_warmup", "instruction_tuning")


@pytest.fixture(autouse=True)
def hydra_configs():
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        HydraConfig.instance().set_config(compose("train", overrides=[*OWN], return_hydra_config=True))
        yield
    HydraConfig.instance().cfg = None


def plan(*own, run_dir="RUN", task=("optim.lr=1e-5,2e-5",), rates=("1e-05", "2e-05")):
    """Jobs 3 and 4, as Hydra's sweeper would give them."""
    batch = [[*OWN, *own, f"optim.lr={rate}"] for rate in rates]
    return plan_jobs([*OWN, *own, *task], batch, 3, str(run_dir))


def test_jobs_are_what_sets_them_apart_and_the_rest(monkeypatch):
    """A process of a job gets an explicit run folder, and does not submit or start jobs in its turn."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first, second = plan("strategy=ddp", "trainer.devices=2", "launcher=local")
    assert first.name == "job 3 optim.lr=1e-05"
    assert second.job.overrides == ("optim.lr=2e-05",)
    assert second.job.run_dir == "RUN/4"
    assert second.job.arguments == (
        *OWN,
        "strategy=ddp",
        "trainer.devices=2",
        "launcher=local",
        "optim.lr=2e-05",
        "run_dir='RUN/4'",
        "launcher.name=none",
    )
    assert (second.job.processes, second.job.devices) == (2, 0)
    assert [config.optim.lr for config in second.configs.values()] == [2e-5, 2e-5]
    assert list(second.configs) == list(STAGES)


@pytest.mark.parametrize(("accelerator", "devices"), [("auto", 4), ("cuda", 4), ("cpu", 0)])
def test_a_job_takes_a_gpu_for_each_rank(accelerator, devices, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    (planned,) = plan("strategy=ddp", "trainer.devices=4", f"trainer.accelerator={accelerator}", rates=("1e-05",))
    assert planned.job.devices == devices


def test_faults_of_all_jobs_are_told_together():
    with pytest.raises(ConfigError) as error:
        plan("trainer.num_nodes=2", "strategy=ddp")
    assert "job 3 (optim.lr=1e-05): stage mlp_warmup: trainer.num_nodes=2, but" in str(error.value)
    assert "job 4 (optim.lr=2e-05): stage mlp_warmup: trainer.num_nodes=2, but" in str(error.value)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("objective.stage=mpo", r"objective\.stage=mpo is not among the stages of the run: mlp_warmup, instruction"),
        ("model.path=null", "stage mlp_warmup has no weights to start from"),
    ],
)
def test_what_a_process_of_a_job_would_refuse(own, message):
    with pytest.raises(ConfigError, match=message):
        plan(own, rates=("1e-05",))


def finish(planned, name, folder, seconds):
    """What a stage leaves when it has finished; the template is then that of its weights."""
    config = planned.configs[name]
    settings = deciding_settings(config) | {"model.template": "internvl2_5"}
    (folder / name).mkdir(parents=True)
    content = asdict(Finished(name, settings, "before", "after", ["llm"], 3, 2.0, 1.0, {"val/loss": 0.5}, seconds))
    (folder / name / "done.json").write_text(json.dumps(content))


def test_a_job_is_finished_with_all_its_stages_and_the_same_settings(tmp_path):
    (planned,) = plan(run_dir=tmp_path, rates=("1e-05",))
    finish(planned, STAGES[0], tmp_path / "3", 10.0)
    assert stage_seconds(planned.chains) is None
    finish(planned, STAGES[1], tmp_path / "3", 5.0)
    assert [one.seconds_before for one in plan(run_dir=tmp_path)] == [15.0, None]
    with pytest.raises(ConfigError, match=r"job 3 .* was finished with optim\.lr=1e-05, this command says 3e-05"):
        plan(run_dir=tmp_path, rates=("3e-05",))


def test_a_terminal_shows_where_a_job_is(tmp_path):
    first, second = plan(run_dir=tmp_path)
    finish(first, STAGES[0], tmp_path / "3", 10.0)
    (tmp_path / "3" / STAGES[1]).mkdir()
    lines = '{"step": 7, "train/loss": 1.5}\n{"step": 8, "tra'
    (tmp_path / "3" / STAGES[1] / "metrics.jsonl").write_text(lines)
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    with JobProgress(2, console) as progress:
        progress.started(first)
        progress.started(second)
        progress.look([first, second])
    shown = console.file.getvalue()
    assert "job 3 optim.lr=1e-05 -> " in shown
    assert "1/2 instruction_tuning, step 7" in shown
    assert "0/2 mlp_warmup" in shown


@pytest.mark.parametrize(
    ("ranks", "replay", "message"),
    [
        (Ranks("torchrun", 0, 2, 0, 2), None, "torchrun has started 2 already: leave torchrun or -m out"),
        (Ranks(), 3, "replay=3 shows a step of one run: leave -m out"),
    ],
)
def test_what_is_no_multirun(ranks, replay, message):
    with pytest.raises(ConfigError, match=message):
        Multirun(ranks).run_jobs(OmegaConf.create({"replay": replay}), [[]], 0)


def test_hydra_hands_jobs_of_a_multirun_over():
    assert with_job_launcher(["-m", "seed=1,2"]) == ["-m", "hydra/launcher=ivl_lightning", "seed=1,2"]
    assert with_job_launcher(["--config-dir", "x", "--multirun"])[-1] == "hydra/launcher=ivl_lightning"
    assert with_job_launcher(["seed=1"]) == ["seed=1"]
    with pytest.raises(ConfigError, match=r"hydra/launcher=joblib has no effect .* use launcher=none, launcher=local"):
        with_job_launcher(["-m", "hydra/launcher=joblib", "seed=1,2"])
