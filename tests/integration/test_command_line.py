"""The command line on a user's own data: mistakes, FSDP, one stage from another run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import own_arguments, train


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Arguments that train one step on a model and data of one's own, with rows held back."""
    return [*own_arguments(tmp_path_factory.mktemp("own"), steps=1), "data.val_rows=4"]


@pytest.mark.soak
def test_fsdp_on_two_ranks_and_then_one_stage_from_its_weights(own, tmp_path):
    """Two gloo ranks train one step sharded; what they write starts another run on one process."""
    sharded = train(*own, f"run_dir={tmp_path}/a", "strategy=fsdp", "trainer.devices=2")
    assert sharded.returncode == 0, sharded.stderr[-3000:]
    done = json.loads((tmp_path / "a/instruction_tuning/done.json").read_text())
    plain = train(*own, f"run_dir={tmp_path}/b", f"init_from={tmp_path}/a", "stage.trainable=[projector]")
    assert plain.returncode == 0, plain.stderr[-3000:]
    after = json.loads((tmp_path / "b/instruction_tuning/done.json").read_text())
    assert after["input_weights"] == done["output_weights"]
    assert after["trained"] == ["projector"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=1"], "optim.lrr is not a setting. Did you mean lr? Accepted here: betas"),
        (["seed=abc"], "seed='abc': input should be a valid integer"),
        (["model=custom", "stages=[2]"], "these settings have no default and were not given: data.meta"),
        (
            ["recipe=internvl2_5_1b", "data.meta=x", "trainer.devices=8"],
            "has no weights to start from",
        ),
        (["stages=[7]"], "stages=['7'] are not known: use language_warmup"),
        (["init_from=/not/there"], "init_from=/not/there: there is no such folder"),
        (["recipe=none"], "there is no stage to run"),
    ],
)
def test_mistakes_end_with_a_message_for_people(arguments, message, tmp_path):
    result = train(*arguments, f"run_dir={tmp_path}/run")
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("pairs", [(), ("stage_data.mixed_preference=pairs.json",)])
def test_a_published_recipe_prefers_where_it_is_told_which_pairs(pairs, tmp_path):
    """Without pairs the chain ends at stage 2, and says so; with them its settings are checked with the others."""
    result = train("recipe=internvl2_5_1b", "data.meta=x", "data.batch_pairs=8", *pairs, f"run_dir={tmp_path}/run")
    assert result.returncode == 1
    assert ("mixed_preference is left out" in result.stdout) == (not pairs)
    assert ("data.batch_pairs=8 is less than data.packs_per_step=128" in result.stderr) == bool(pairs)


def test_help_and_cfg_load_no_torch(tmp_path):
    """Start-up: the configuration is shown without importing torch."""
    for flag in (["--help"], ["--cfg", "job"]):
        code = f"import sys; sys.argv = ['train.py', *{flag!r}]; from ivl_lightning.cli.train import main\n"
        code += "import atexit; atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\nmain()"
        start = time.monotonic()
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "TORCH False" in result.stdout
        assert "mlp_warmup" in result.stdout
        assert time.monotonic() - start < 30


def test_another_project_composes_our_groups(tmp_path):
    """A Hydra application of its own finds our groups through hydra.searchpath and checks them with our schema."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/app.yaml").write_text(
        "hydra:\n  searchpath: [pkg://ivl_lightning.conf]\n"
        "defaults:\n  - data: default\n  - optim: adamw\n  - _self_\n"
        "data:\n  meta: /data/meta.json\n  cache_dir: null\n"
    )
    (tmp_path / "app.py").write_text(
        "import hydra\nfrom omegaconf import OmegaConf\n"
        "from ivl_lightning.config.check import load\n"
        "from ivl_lightning.config.schema import DataConfig, OptimConfig\n"
        '@hydra.main(version_base="1.3", config_path="conf", config_name="app")\n'
        "def main(cfg):\n"
        "    data = load(DataConfig, OmegaConf.to_container(cfg.data, resolve=True))\n"
        "    optim = load(OptimConfig, OmegaConf.to_container(cfg.optim))\n"
        "    print(data.meta, data.max_tokens, optim.lr)\n"
        "main()\n"
    )
    command = [sys.executable, "app.py", "optim.lr=3e-5"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "/data/meta.json 16384 3e-05", result.stderr


def test_the_source_of_a_chain_is_a_run_a_stage_or_a_folder(own, tmp_path):
    """`init_from` of a weights folder; the run's ledger and report are written beside it."""
    model = Path(next(a for a in own if a.startswith("model.path=")).partition("=")[2])
    result = train(*own, f"run_dir={tmp_path}/c", f"init_from={model}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "c/report.html").is_file()
