"""When a stage is skipped, and from which weights a chain starts."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ivl_lightning.checkpoints.run_folders import weights_folder
from ivl_lightning.config import schema
from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.finished import Finished, check_same, deciding_settings, read_finished, weights_hash
from ivl_lightning.models.loader import build_model
from tests import tiny


def config(**changes) -> schema.RunConfig:
    settings = {
        "seed": 0,
        "run_dir": "RUN",
        "stage": schema.StageConfig(_target_="x", name="mlp_warmup"),
        "model": schema.ModelConfig(),
        "data": schema.DataConfig(meta="m"),
        "loss": schema.LossConfig(),
        "optim": schema.OptimConfig(),
        "trainer": schema.TrainerConfig(),
        "strategy": schema.StrategyConfig(),
    }
    return schema.RunConfig(**{**settings, **changes})


def finished(**changes) -> Finished:
    settings = {
        "stage": "mlp_warmup",
        "settings": deciding_settings(config()),
        "input_weights": "a",
        "output_weights": "b",
        "trained": ["projector"],
        "steps": 3,
        "loss_first": 2.0,
        "loss_last": 1.0,
    }
    return Finished(**{**settings, **changes})


def test_done_json_comes_back_as_written(tmp_path):
    assert read_finished(tmp_path) is None
    finished(scores={"val/loss": 1.5}).write(tmp_path)
    assert read_finished(tmp_path) == finished(scores={"val/loss": 1.5})


@pytest.mark.parametrize(
    "changes",
    [
        {"run_dir": "OTHER"},
        {"trainer": schema.TrainerConfig(devices=8, progress_bar=False)},
        {"strategy": schema.StrategyConfig(name="fsdp")},
        {"logger": {"csv": None}},
        {"callbacks": {"other": {"limit": 3}}},
        {"data": schema.DataConfig(meta="m", num_workers=9, cache_dir="c")},
    ],
)
def test_how_a_stage_ran_does_not_matter(changes, tmp_path):
    """The same numbers come out on any layout, so a run finished on one is finished on another."""
    check_same(finished(), config(**changes), "a", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed=0, this command says 1"),
        ({"optim": schema.OptimConfig(lr=1.0)}, "optim.lr=4e-05, this command says 1.0"),
        ({"optim": schema.OptimConfig(betas=[0.9, 0.95])}, "optim.betas=.0.9, 0.999., this command says .0.9, 0.95."),
        ({"data": schema.DataConfig(meta="n")}, "data.meta='m', this command says 'n'"),
        ({"callbacks": {"ema": {"decay": 0.9}}}, "callbacks.ema.decay=None, this command says 0.9"),
    ],
)
def test_what_a_stage_learned_from_matters(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_same(finished(), config(**changes), "a", tmp_path)


def test_other_input_weights_are_noticed(tmp_path):
    with pytest.raises(ConfigError, match="other input weights"):
        check_same(finished(), config(), "z", tmp_path)


def test_weights_hash_follows_content_and_names(tmp_path):
    with pytest.raises(ConfigError, match="holds no weights"):
        weights_hash(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"one")
    first = weights_hash(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"two")
    second = weights_hash(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert len({first, second, weights_hash(tmp_path)}) == 3


def test_where_weights_come_from(tmp_path: Path):
    """A folder of weights, a stage's folder, or a run, of which the stage that finished last counts."""
    for age, name in enumerate(("mlp_warmup", "instruction_tuning")):
        weights = tmp_path / name / "weights"
        weights.mkdir(parents=True)
        (weights / "config.json").write_text("{}")
        (tmp_path / name / "done.json").write_text(json.dumps({}))
        os.utime(tmp_path / name / "done.json", (age, age))
    assert weights_folder(str(tmp_path)) == tmp_path / "instruction_tuning/weights"
    assert weights_folder(str(tmp_path / "mlp_warmup")) == tmp_path / "mlp_warmup/weights"
    assert weights_folder(str(tmp_path / "mlp_warmup/weights")) == tmp_path / "mlp_warmup/weights"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: neither a folder of weights nor a run"):
        weights_folder(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="nothing: there is no such folder"):
        weights_folder(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"done\.json: this is a file: give its folder"):
        weights_folder(str(tmp_path / "mlp_warmup/done.json"))


def test_a_changed_setting_is_found_in_both_directions(tmp_path):
    """A setting that only the finished stage knew (an older version's) is named too."""
    older = finished(settings={**deciding_settings(config()), "optim.gone": 1})
    with pytest.raises(ConfigError, match=r"optim.gone=1, this command says None"):
        check_same(older, replace(config()), "a", tmp_path)


def test_random_weights_follow_from_the_seed_alone():
    """Whatever drew numbers before (measuring data that were not measured yet), and it does not notice."""
    tokenizer = tiny.load_tiny_tokenizer()

    def built(seed: int, drawn: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        model = build_model(tiny.tiny_config(), tokenizer, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.get_input_embeddings().weight, model.model.vision_tower.embeddings.cls_token

    first = built(3, drawn=1)
    assert all(torch.equal(one, other) for one, other in zip(first, built(3, drawn=2), strict=True))
    assert not torch.equal(first[0], built(4, drawn=1)[0])
