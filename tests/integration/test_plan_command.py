"""`ivl-plan` takes the arguments of `train.py`, reads configurations, tokenizer and index, and makes nothing."""

import io
import json
import subprocess
import sys

import pytest
from hydra import initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from ivl_lightning.config.plan import PlanConfig
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.forecast import forecast_stages
from ivl_lightning.launch.forecast_lines import duration, print_forecast
from ivl_lightning.launch.network import tokenizer_of
from ivl_lightning.launch.run_stage import build_datamodule
from tests.commands import ROOT, environment, own_arguments


def plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ivl_lightning.cli.plan", *arguments],
        cwd=ROOT,
        env={**environment(), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_stage_is_told_and_written(tmp_path):
    file = tmp_path / "forecast.json"
    result = plan(
        "recipe=internvl2_5_8b",
        "trainer.devices=8",
        "trainer.num_nodes=4",
        "strategy=fsdp",
        "strategy.param_dtype=bfloat16",
        "stages=[2]",
        f"run_dir={tmp_path}/run",
        "plan.gpu=a100_40gb",
        f"plan.json={file}",
    )
    # Whole gradients of 8 B weights leave no room on 40 GB.
    assert result.returncode == 1, result.stderr[-2000:]
    assert "1  instruction_tuning trains vision, projector, llm" in result.stdout
    assert "strategy.sync_every_micro_batch=true" in result.stdout
    assert "the first that fits" in result.stdout
    written = json.loads(file.read_text())
    assert list(written["stages"]) == ["instruction_tuning"]
    stage = written["stages"]["instruction_tuning"]
    assert stage["steps"] == 5500
    assert stage["memory"]["fits"] is False
    assert stage["memory"]["peak"] == pytest.approx(sum(stage["memory"]["moments"][stage["memory"]["at"]].values()))
    assert [change["fits"] for change in stage["changes"]] == [True]
    assert not (tmp_path / "run").exists()


def test_a_misspelt_setting_is_named():
    result = plan("recipe=internvl2_5_1b", "plan.gpuu=h100")
    assert result.returncode == 1
    assert "gpuu is not a setting. Did you mean gpu?" in result.stderr


def test_defaults_are_those_of_the_dataclass():
    own = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/plan.yaml").plan)
    assert own == {name: getattr(PlanConfig(), name) for name in own}
    assert set(own) == set(PlanConfig.__dataclass_fields__)


def test_measured_data_say_what_packs_hold(tmp_path):
    """24 rows, all of which train; before they are measured a pack is taken to be full."""
    arguments = [
        "recipe=none",
        *own_arguments(tmp_path, steps=1)[:-1],
        "trainer.max_epochs=3",
        f"data.cache_dir={tmp_path}/index",
        "data.packs_per_step=1",
    ]
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        config = compose_stage("instruction_tuning", arguments, run_dir=str(tmp_path / "run"))

    def forecast():
        return forecast_stages({"instruction_tuning": config}, PlanConfig(), stand_in=lambda: 0)["instruction_tuning"]

    before = forecast()
    assert before.forecast.load.source == "caps"
    assert before.forecast.load.tokens == 420
    assert before.steps is None
    assert not list(tmp_path.glob("index/*"))
    datamodule = build_datamodule(config, tokenizer_of(config.model))
    corpus, _ = datamodule.read_corpora(progress=False)
    after = forecast()
    load, rows = after.forecast.load, corpus.plan_rows
    assert load.source == "index"
    datamodule.setup("fit")
    steps = list(datamodule.stream.packs(0, 1))[:-1]
    # The epoch's last step may be short and does not count.
    assert load.tokens == pytest.approx(sum(step.pack.tokens for step in steps) / len(steps))
    squares = sum(int(rows.tokens[row % len(rows)]) ** 2 for step in steps for row in step.pack.samples)
    assert load.squares == pytest.approx(squares / len(steps), rel=1e-6)
    assert after.steps is not None
    console = Console(width=200, record=True, file=io.StringIO())
    print_forecast({"instruction_tuning": after}, PlanConfig(), console)
    assert "samples/s" in console.export_text()


def test_durations_are_for_people():
    assert [duration(seconds) for seconds in (90, 5400, 3 * 86400)] == ["1.5 min", "1.5 h", "3.0 days"]
