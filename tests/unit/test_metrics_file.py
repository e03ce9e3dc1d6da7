"""Choosing loggers, the metrics file, and the arithmetic of speed."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from hydra import initialize_config_module

from ivl_lightning.callbacks.throughput import amounts, device_peak, step_work
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import LoraSettings
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.loggers import build_loggers
from ivl_lightning.launch.metrics_file import MetricsFile
from ivl_lightning.models.parts import text_config
from ivl_lightning.planning.hardware import gpu_named
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mlp_warmup import MLPWarmup
from tests import tiny

# -- loggers ----------------------------------------------------------------------------------------------------------


def composed(*arguments, run_dir="RUN"):
    known = ["recipe=none", "data.meta=M", "data.tile_size=64", "model.tokenizer=T"]
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        return compose_stage("instruction_tuning", [*known, *arguments], run_dir=str(run_dir))


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("seed=0", ["CSVLogger"]),
        ("logger=none", []),
        ("logger=wandb", ["WandbLogger"]),
        ("logger=[csv,tensorboard,wandb_offline]", ["CSVLogger", "TensorBoardLogger", "WandbLogger"]),
    ],
)
def test_the_metrics_file_is_written_whatever_else_logs(tmp_path, argument, names):
    config = composed(argument, run_dir=tmp_path)
    loggers = build_loggers(config, tmp_path / "instruction_tuning")
    assert [type(logger).__name__ for logger in loggers] == [*names, "MetricsFile"]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"logger={package} needs .*pip install 'ivl-lightning\[{package}\]'"):
        composed(f"logger={package}")


# -- the metrics file -------------------------------------------------------------------------------------------------


def test_a_killed_process_leaves_what_it_has_logged(tmp_path):
    child = os.fork()
    if child == 0:
        MetricsFile(tmp_path / "stage").log_metrics({"train/loss": 0.5}, 3)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "stage/metrics.jsonl").read_text() == '{"step": 3, "train/loss": 0.5}\n'


def test_the_next_attempt_appends_behind_the_last_whole_line(tmp_path):
    """Half a line is cut off, as a machine that went down may leave it; nothing but JSON is written."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2.0}\n{"step": 2, "a"')
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"a": float("nan"), "b": float("inf")}, 2)
    logger.log_metrics({"a": 0.1}, 3)
    assert path.read_text() == '{"step": 1, "a": 2.0}\n{"step": 2, "a": null, "b": null}\n{"step": 3, "a": 0.1}\n'
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3]


# -- speed ------------------------------------------------------------------------------------------------------------


def test_amounts_of_documents():
    """3 tokens of text, and 5 with 2 tiles: squares 3^2 + (5 + tiles)^2; filler counts for nothing."""
    rng = np.random.default_rng(0)
    batch = tiny.pack([tiny.random_document(rng, 3, trained=2), tiny.random_document(rng, 5, tiles=2, trained=4)])
    length = 5 + 2 * tiny.TILE_TOKENS
    assert amounts(batch) == (3 + length, 9 + length**2, 2, 6)
    assert amounts(tiny.pack([])) == (0, 0, 0, 0)


@pytest.mark.parametrize(("shared", "tokens", "squares"), [(True, 6, 9 + 16 + 7), (False, 9, 25 + 16)])
def test_amounts_of_a_pair(shared, tokens, squares):
    """Prompt 3, answers 2 and 1. Side by side 3^2, (3 + 2)^2 - 3^2 and (3 + 1)^2 - 3^2; apart 5^2 and 4^2."""
    batch = tiny.pair_batch([tiny.random_pair(np.random.default_rng(0), 3, 2, 1)], shared_prefix=shared)
    assert amounts(batch) == (tokens, squares, 0, 3)


def work_by_hand(config, total, *, language, vision, projector, head):
    """Each part's forward pass, times the passes that its training costs.

    2 operations a weight and position; a causal row of attention looks at half of the square, in two products.
    """
    tokens, squares, tiles, labels = total
    text, tower = text_config(config), config.vision_config
    width, hidden, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    keys = width // text.num_attention_heads * text.num_key_value_heads
    blocks = layers * (tokens * 2 * (2 * width**2 + 2 * width * keys + 3 * width * hidden) + squares * 2 * width)
    # In the last block rows without a label are not multiplied.
    blocks -= (tokens - labels) * 2 * 3 * width * hidden
    places = (tiny.TILE_SIZE // tiny.PATCH_SIZE) ** 2 + 1
    per_layer = 2 * places * (4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size)
    per_tile = tower.num_hidden_layers * (per_layer + 4 * tower.hidden_size * places**2)
    folded = 4 * tower.hidden_size
    linear = 2 * tiny.TILE_TOKENS * (folded * width + width**2)
    last = labels * 2 * width * text.vocab_size
    return language * blocks + vision * tiles * per_tile + projector * tiles * linear + head * last


@pytest.mark.parametrize(
    ("kind", "lora", "passes"),
    [
        (InstructionTuning, None, {"language": 3, "vision": 3, "projector": 3, "head": 3}),
        # The gradient goes through the language model to the projector, whose input needs none.
        (MLPWarmup, None, {"language": 2, "vision": 1, "projector": 2, "head": 2}),
        (InstructionTuning, LoraSettings(parts=["llm"]), {"language": 2, "vision": 1, "projector": 1, "head": 2}),
    ],
)
def test_work_of_a_step(model, kind, lora, passes):
    """Forward 1, what is before it in the graph 1, its own weights 1; nothing repeated and no filler."""
    stage = kind(model, lora=lora)
    stage.configure_model()
    total = [700.0, 700.0 * 90, 11.0, 130.0]
    assert step_work(stage, total) == pytest.approx(work_by_hand(model.config, total, **passes))


def test_peaks_of_known_devices():
    """Dense figures of the data sheets; other builds of a chip are not guessed."""
    assert gpu_named("NVIDIA H100 80GB HBM3").bfloat16 == 989e12
    assert gpu_named("NVIDIA A100-SXM4-40GB").float32 == 19.5e12
    for name in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GH200 480GB", ""):
        assert gpu_named(name) is None
    assert device_peak(torch.device("cpu"), bfloat16=True) is None
