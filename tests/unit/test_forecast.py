"""Sizes, work and traffic of a forecast, by hand and on real modules; and a run whose hours were published."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hydra import initialize_config_module
from torch.utils.flop_counter import FlopCounterMode

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.plan import PlanConfig, check_plan
from ivl_lightning.config.schema import LoraSettings
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.network import shapes_of, trained_parts
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.build import random_model
from ivl_lightning.models.freeze import part_sizes, set_trainable
from ivl_lightning.models.last_layer import select_in_last_layer
from ivl_lightning.models.lora import add_lora
from ivl_lightning.planning.forecast import forecast_stage
from ivl_lightning.planning.hardware import GPUS
from ivl_lightning.planning.layout import layout_of
from ivl_lightning.planning.load import Load, load_at_caps
from ivl_lightning.planning.network import plan_network
from ivl_lightning.planning.remedies import remedies
from ivl_lightning.planning.work import traffic, work_of
from ivl_lightning.stages.root import InternVLWithLoss
from tests import tiny

FSDP = ("strategy=fsdp", "strategy.param_dtype=bfloat16")


@pytest.fixture(autouse=True, scope="module")
def configs():
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        yield


@cache
def stage(recipe, *overrides):
    return compose_stage("instruction_tuning", [f"recipe={recipe}", "++data.meta=none", *overrides], run_dir="RUN")


def sizes(config):
    return plan_network(
        shapes_of(config.model),
        trained_parts(config.stage, config.lora),
        dtype=config.model.dtype,
        last_vision_layers=config.stage.trainable_vision_layers,
        lora=config.lora,
    )


@pytest.fixture(scope="module")
def forty_billion():
    return sizes(stage("internvl1_2", *FSDP, "trainer.devices=8", "trainer.num_nodes=4"))


@pytest.fixture(scope="module")
def eight_billion():
    return sizes(stage("internvl2_5_8b"))


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("internvl2_5_1b", ("stage.trainable_vision_layers=3",)),
        ("internvl2_5_8b", ()),
        ("internvl2_5_78b", ("stage.trainable=[projector]",)),
        ("internvl1_2", ()),
        ("internvl2_4b", ()),
    ],
)
def test_parameters_are_those_of_the_real_modules(recipe, overrides):
    """The network itself, on the meta device, frozen as the stage freezes it."""
    config = stage(recipe, *overrides)
    with torch.device("meta"):
        model = random_model(config.model, 0)
    set_trainable(
        model,
        trained_parts(config.stage, config.lora),
        last_vision_layers=config.stage.trainable_vision_layers,
    )
    counted = sizes(config).parts
    assert {part.name: (part.total, part.trainable) for part in part_sizes(model)} == {
        name: (count.total, count.trainable) for name, count in counted.items()
    }


def test_the_released_sizes(eight_billion):
    """InternViT-300M has 304 M parameters, InternVL2.5-8B 8.08 B."""
    assert eight_billion.parts["vision"].total == 304_012_288
    assert eight_billion.whole.total == pytest.approx(8.08e9, rel=1e-3)


@pytest.mark.parametrize("parts", [["llm"], ["vision", "llm"]])
def test_adapters_are_those_of_the_real_modules(parts):
    settings = LoraSettings(parts=parts, rank=3)
    model = random_model(tiny.tiny_config(), 300)
    planned = plan_network(model.config, ["vision", "projector", "llm"], lora=settings)
    set_trainable(model, ["vision", "projector", "llm"])
    add_lora(model, settings)
    assert {part.name: (part.total, part.trainable) for part in part_sizes(model)} == {
        name: (count.total, count.trainable) for name, count in planned.parts.items()
    }


# -- memory -----------------------------------------------------------------------------------------------------------


def test_whole_gradients_wait_for_the_last_micro_batch(eight_billion):
    """FSDP without a reduction keeps a float32 gradient of every weight on every rank; with one, a share of 1 / 32."""
    config = stage("internvl2_5_8b", *FSDP, "trainer.devices=8", "trainer.num_nodes=4")
    plan, trained = PlanConfig(), eight_billion.whole.trainable
    whole = forecast_stage(config, eight_billion, plan).memory.parts
    assert whole["whole gradients"] == 4 * trained
    assert whole["weights"] == pytest.approx(4 * trained / 32)
    assert whole["optimizer"] == pytest.approx(8 * trained / 32)
    synced = replace(config, strategy=replace(config.strategy, sync_every_micro_batch=True))
    parts = forecast_stage(synced, eight_billion, plan).memory.parts
    assert "whole gradients" not in parts
    assert parts["gradients"] == pytest.approx(4 * trained / 32)


def test_hybrid_shards_lie_in_a_node(eight_billion):
    """On 4 nodes of 8, a rank keeps an eighth of the weights and not a thirty-second."""
    layout = ("trainer.devices=8", "trainer.num_nodes=4", "strategy.param_dtype=bfloat16")
    parts = forecast_stage(stage("internvl2_5_8b", "strategy=hsdp", *layout), eight_billion, PlanConfig()).memory.parts
    assert parts["weights"] == pytest.approx(4 * eight_billion.whole.total / 8)


def test_a_single_micro_batch_has_its_gradients_while_activations_go(eight_billion):
    """With one micro-batch a step, gradients are not there in forward: the peak is lower by less than all of them."""
    config = stage("internvl2_5_8b", *FSDP, "trainer.devices=8", "data.packs_per_step=8")
    assert layout_of(config).accumulation == 1
    moments = forecast_stage(config, eight_billion, PlanConfig()).memory.moments
    assert "gradients" not in moments["loss head"]
    assert moments["optimizer step"]["gradients"] == pytest.approx(4 * eight_billion.whole.trainable / 8)


def test_changes_are_told_until_one_fits(eight_billion):
    """8B on 8 GPUs of 40 GB: whole gradients alone are 32 GB, so reductions with each micro-batch come first."""
    config = stage("internvl2_5_8b", "trainer.devices=8", "strategy=ddp", "model.activation_checkpointing=false")
    plan = PlanConfig(gpu="a100_40gb")
    found = remedies(config, lambda changed: forecast_stage(changed, eight_billion, plan))
    assert [remedy.settings for remedy in found] == [
        "model.activation_checkpointing=true",
        "strategy=fsdp strategy.param_dtype=bfloat16",
        "strategy.sync_every_micro_batch=true",
    ]
    peaks = [remedy.forecast.memory.peak for remedy in found]
    assert peaks == sorted(peaks, reverse=True)
    assert [remedy.forecast.fits for remedy in found] == [False, False, True]


def test_one_gpu_is_told_to_be_more(eight_billion):
    config = stage("internvl2_5_8b", "data.packs_per_step=8")
    found = remedies(config, lambda changed: forecast_stage(changed, eight_billion, PlanConfig()))
    last = found[-1]
    assert last.settings == "strategy=fsdp strategy.param_dtype=bfloat16 trainer.devices=8 trainer.num_nodes=1"
    assert last.forecast.fits


# -- work and traffic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [["vision", "projector", "llm"], ["projector"]])
def test_work_is_what_torch_counts(trainable):
    """Products that torch itself counts in a step of a real network, wide enough that they are nearly all.

    Documents are short: torch counts attention whole, and the causal half is what is needed.
    """
    config = tiny.tiny_config(
        vision={**tiny.tiny_config().vision, "hidden_size": 128, "intermediate_size": 512},
        language_model={**tiny.tiny_config().language_model, "hidden_size": 128, "intermediate_size": 512},
    )
    model = random_model(config, 500)
    model.config.image_token_id = tiny.image_token_id(tiny.load_tiny_tokenizer())
    select_in_last_layer(model)
    set_trainable(model, trainable)
    rng = np.random.default_rng(0)
    batch = tiny.pack([tiny.random_document(rng, 12, tiles=2, trained=6) for _ in range(20)])
    root = InternVLWithLoss(model, NextTokenLoss())
    with FlopCounterMode(display=False) as counter:
        root(batch)[0].backward()
    network = plan_network(model.config, trainable)
    tokens, tiles = batch.input_ids.shape[1], len(batch.pixel_values)
    load = Load("caps", 20, tokens, 20 * (tokens / 20) ** 2, tiles, len(batch.loss_rows), 0.0)
    work = work_of(network, load)
    assert counter.get_total_flops() == pytest.approx(work.executed, rel=0.05)


def test_a_repeated_forward_pass_is_a_third_more(eight_billion):
    """Forward 1, backward 2, and with checkpointing the blocks' forward once more: 4 in place of 3, less the head."""
    config = stage("internvl2_5_8b", *FSDP, "trainer.devices=8")
    load = load_at_caps(config.data, "conversations", tile_tokens=256, label_share=0.15)
    work = work_of(eight_billion, load, checkpointing=config.model.activation_checkpointing)
    assert work.backward == pytest.approx(2 * work.forward)
    assert 0.95 < work.recomputed / work.forward < 1


def test_traffic_by_hand(eight_billion):
    """4 ranks: 3/4 of the weights in bfloat16 come twice a micro-batch, and 3/4 of float32 gradients once a step."""
    number = eight_billion.whole.total
    layout = layout_of(stage("internvl2_5_8b", *FSDP, "trainer.devices=4", "data.packs_per_step=8"))
    assert layout.accumulation == 2
    inner, outer = traffic(eight_billion, layout)
    assert inner == pytest.approx(0.75 * (2 * 2 * 2 + 4) * number)
    assert outer == 0
    ddp = layout_of(stage("internvl2_5_8b", "strategy=ddp", "trainer.devices=4", "data.packs_per_step=8"))
    assert traffic(eight_billion, ddp) == (0, pytest.approx(2 * 0.75 * 4 * number))


# -- a published run --------------------------------------------------------------------------------------------------

SAMPLES, BATCH, A100_HOURS = 1.2e6, 512, 32 * 36
"""InternVL-Chat-V1.2 (its model card): 1.5 days on 32 A100, and about 18 hours on 64, which are as many hours."""


def published_share(network, length):
    """Share of the A100's peak that the published hours mean, at a mean length that was not published."""
    config = stage("internvl1_2", *FSDP, "trainer.devices=8", "trainer.num_nodes=4")
    # One tile a picture; a sixth of the tokens supervised.
    load = Load("caps", BATCH, BATCH * length, BATCH * length**2, BATCH, BATCH * length / 6, 0.0)
    work = work_of(network, load, checkpointing=config.model.activation_checkpointing)
    return work.useful * SAMPLES / BATCH / (A100_HOURS * 3600 * GPUS["a100_80gb"].bfloat16)


def test_the_published_hours_of_internvl_1_2_are_plausible(forty_billion):
    """6 x 40e9 x tokens gives 46 % of the peak at 2,048 tokens and 22 % at 1,000.

    Here the tower's work follows tiles and not tokens, which is less at 2,048 and more at 1,000.
    """
    assert published_share(forty_billion, 2048) == pytest.approx(0.46, abs=0.05)
    assert published_share(forty_billion, 1000) == pytest.approx(0.22, abs=0.02)
    assert A100_HOURS == 64 * 18


def test_twice_the_gpus_take_half_the_time(forty_billion):
    """As published. At 35 % of the peak and 1,000 tokens, repeated forward passes included, it is within the range."""
    plan = PlanConfig(gpu="a100_80gb", mfu=0.35)
    load = Load("caps", BATCH, BATCH * 1000, BATCH * 1000**2, BATCH, BATCH * 1000 / 6, 0.0)
    hours = []
    for nodes in (4, 8):
        config = stage("internvl1_2", *FSDP, "trainer.devices=8", f"trainer.num_nodes={nodes}")
        forecast = forecast_stage(config, forty_billion, plan, load)
        hours.append(SAMPLES / BATCH * forecast.pace.step / 3600)
    assert hours[0] / hours[1] == pytest.approx(2, rel=0.05)
    assert 18 < hours[0] < 36


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_out_of_range_are_named():
    with pytest.raises(ConfigError, match=r"(?s)plan\.mfu=1\.5.*plan\.storage_gb=0"):
        check_plan(PlanConfig(mfu=1.5, storage_gb=0))
