"""Parameter groups and the learning-rate curve."""

import math

import pytest
import torch
from torch.nn import Parameter

from ivl_lightning.models.freeze import model_parts, set_trainable
from ivl_lightning.optim.adamw import AdamW
from ivl_lightning.optim.param_groups import parameter_groups
from ivl_lightning.optim.schedule import WarmupSchedule


def groups_of(model, **changes):
    parts = model_parts(model)
    named = {
        part: [item for module in modules for item in module.named_parameters()] for part, modules in parts.items()
    }
    options = {"lr": dict.fromkeys(parts, 1e-3), "weight_decay": dict.fromkeys(parts, 0.1), "vision_layers": 2}
    return parameter_groups(named, **{**options, **changes})


def test_frozen_parts_get_no_group(model):
    set_trainable(model, ["projector"])
    assert {group["name"] for group in groups_of(model)} == {"projector", "projector_no_decay"}


def test_only_matrices_decay(model):
    """Norms, biases, layer scales, class token, positions and token embeddings are left out."""
    groups = {group["name"]: group for group in groups_of(model)}
    assert all(group["weight_decay"] == (0.0 if "no_decay" in name else 0.1) for name, group in groups.items())
    plain = {id(p) for name, group in groups.items() if "no_decay" in name for p in group["params"]}
    tower = model.model.vision_tower
    for parameter in (
        tower.embeddings.cls_token,
        tower.embeddings.position_embeddings,
        tower.encoder.layer[0].lambda_1,
        model.get_input_embeddings().weight,
    ):
        assert id(parameter) in plain
    for parameter in (tower.embeddings.patch_embeddings.projection.weight, model.lm_head.weight):
        assert id(parameter) not in plain


def test_decay_all_is_the_original(model):
    groups = groups_of(model, decay="all")
    assert [group["name"] for group in groups] == ["vision", "projector", "llm"]
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="matrices or all"):
        groups_of(model, decay="some")


def test_layer_decay_by_hand(model):
    """L = 2, d = 0.5, lr 1e-3: last layer 1e-3, first 5e-4, embeddings 2.5e-4; other parts 1e-3."""
    groups = groups_of(model, vision_layer_decay=0.5)
    tower = model.model.vision_tower
    lr = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert lr[id(tower.encoder.layer[1].mlp.fc1.weight)] == pytest.approx(1e-3)
    assert lr[id(tower.encoder.layer[0].mlp.fc1.weight)] == pytest.approx(5e-4)
    assert lr[id(tower.embeddings.cls_token)] == pytest.approx(2.5e-4)
    assert lr[id(model.lm_head.weight)] == pytest.approx(1e-3)


def test_rates_by_part(model):
    groups = groups_of(model, lr={"vision": 1e-5, "projector": 2e-4, "llm": 0.0})
    assert {group["name"].split("_")[0]: group["lr"] for group in groups} == {
        "vision": 1e-5,
        "projector": 2e-4,
        "llm": 0.0,
    }


def test_cosine_equals_the_library():
    """Steps of warm-up and cosine as transformers' `get_cosine_schedule_with_warmup`, which the original uses."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
    library = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * 110), 110)
    ours = WarmupSchedule(warmup_ratio=0.03, max_steps=110)
    for step in range(110):
        assert ours.factor(step, 0.0) == pytest.approx(library.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        library.step()


def test_schedule_by_samples():
    """Without max_steps the share of consumed samples counts: warm-up 0.1, then cosine over the rest.

    0.05 -> 1/2; 0.1 -> 1; halfway through the rest, 0.55 -> (1 + cos(pi/2)) / 2 = 1/2; at the end 0.
    """
    schedule = WarmupSchedule(warmup_ratio=0.1)
    assert [schedule.factor(0, done) for done in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    counted = WarmupSchedule(warmup_steps=4)
    assert [counted.factor(step, 0.0) for step in (0, 2, 4)] == pytest.approx([0, 0.5, 1])


def test_floor_and_constant():
    """The floor 0.2 is reached at the end and kept after it; constant stays at 1 after the warm-up."""
    floor = WarmupSchedule(max_steps=10, min_ratio=0.2)
    assert floor.factor(10, 0) == floor.factor(12, 0) == pytest.approx(0.2)
    constant = WarmupSchedule(shape="constant", warmup_steps=2, max_steps=10)
    assert [constant.factor(step, 0) for step in (0, 1, 2, 10)] == pytest.approx([0, 0.5, 1, 1])
    with pytest.raises(ValueError, match="cosine or constant"):
        WarmupSchedule(shape="linear")


def test_adamw_is_that_of_torch_and_may_be_clipped():
    """Three steps on a CPU, bit for bit. Lightning clips gradients only where none is unscaled in the step."""
    found = []
    for build in (AdamW, torch.optim.AdamW):
        parameter = Parameter(torch.tensor([1.0, -2.0]))
        optimizer = build([{"params": [parameter], "lr": 0.1, "weight_decay": 0.2}], betas=(0.9, 0.95), eps=1e-6)
        for _ in range(3):
            (parameter**3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((optimizer, parameter.detach()))
    assert torch.equal(found[0][1], found[1][1])
    assert not getattr(found[0][0], "_step_supports_amp_scaling", False)
