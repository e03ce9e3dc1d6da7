"""Adapters: which layers get them, what trains, how they merge, what settings and checkpoints are refused."""

import importlib.util
from dataclasses import asdict

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import InternVLForConditionalGeneration

from ivl_lightning.checkpoints.fingerprint import check_fingerprint, fingerprint
from ivl_lightning.checkpoints.lora import lora_groups, merge, merged_state_dict
from ivl_lightning.config import schema
from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.config.schema import LoraSettings
from ivl_lightning.config.validate import validate
from ivl_lightning.launch.adapter import save_adapter
from ivl_lightning.launch.finished import deciding_settings
from ivl_lightning.launch.network import cost_of
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.freeze import frozen_modules, part_sizes, set_trainable
from ivl_lightning.models.lora import adapters_off, add_lora, lora_scale
from ivl_lightning.models.quantize import four_bit_names, quantize_language_model
from ivl_lightning.models.streaming import empty_model
from ivl_lightning.optim.param_groups import parameter_groups
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mixed_preference import MixedPreference
from ivl_lightning.stages.mlp_warmup import MLPWarmup
from ivl_lightning.stages.root import InternVLWithLoss
from tests import tiny

CPU = torch.device("cpu")
BOTH = ["vision", "llm"]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra qlora"
)


def batch_of(*tiles):
    rng = np.random.default_rng(0)
    return tiny.pack([tiny.random_document(rng, 10, tiles=count) for count in tiles])


def losses_of(model, batch):
    with torch.no_grad():
        return InternVLWithLoss(model, NextTokenLoss())(batch)[1]


def move_adapters(model, seed=1):
    """Give A and B values as if they had been trained; B begins at 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# -- merging names and tensors ------------------------------------------------------------------------------------


def test_a_merge_by_hand():
    """W + s B A with s = 0.5: [[1, 2], [3, 4]] + 0.5 * [[2], [4]] [[1, 3]] = [[2, 5], [5, 10]]."""
    base, a, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 3]]), torch.tensor([[2.0], [4]])
    assert merge(base, a, b, 0.5).tolist() == [[2.0, 5.0], [5.0, 10.0]]


def test_a_merge_is_computed_in_float32():
    """In bfloat16 256 + 1 = 256, so two halves of 1 would be lost one by one; their sum of 2 is not."""
    base = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    ones = torch.ones(2, 1, dtype=torch.bfloat16)
    merged = merge(base, ones, ones.T, 1.0)
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 258.0


@pytest.mark.parametrize(("a", "b"), [((2, 3), (4, 3)), ((2, 5), (4, 2)), ((2, 3), (5, 2)), ((3,), (4, 2))])
def test_shapes_that_do_not_fit_are_named(a, b):
    with pytest.raises(ValueError, match=r"weight of shape \(4, 3\) cannot take A of shape"):
        merge(torch.zeros(4, 3), torch.zeros(a), torch.zeros(b), 1.0)


def test_names_of_all_layouts():
    """peft's own, its older ones, an adapter file's, and the original's wrapped language model and vision tower."""
    names = ["x.q.base_layer.weight", "x.q.base_layer.bias", "x.q.lora_A.default.weight", "x.q.lora_B.default.weight"]
    q = ("x.q.base_layer.weight", "x.q.lora_A.default.weight", "x.q.lora_B.default.weight")
    assert lora_groups([*names, "x.norm.weight"]) == {
        "x.q.weight": q,
        "x.q.bias": ("x.q.base_layer.bias", None, None),
        "x.norm.weight": ("x.norm.weight", None, None),
    }
    file = ["x.weight", "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"]
    assert lora_groups(file) == {"x.weight": tuple(file)}
    older = "language_model.base_model.model.model.layers.0.attention.wqkv"
    wrapped = [f"{older}.weight", f"{older}.lora_A.default.weight", f"{older}.lora_B.default.weight"]
    assert lora_groups([*wrapped, "language_model.base_model.model.output.weight", "mlp1.0.weight"]) == {
        "language_model.model.layers.0.attention.wqkv.weight": tuple(wrapped),
        "language_model.output.weight": ("language_model.base_model.model.output.weight", None, None),
        "mlp1.0.weight": ("mlp1.0.weight", None, None),
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x.weight", "x.lora_A.default.weight"], r"x.lora_A.default.weight has no counterpart lora_B"),
        (["x.weight", "x.lora_B.weight"], r"x.lora_B.weight has no counterpart lora_A"),
        (["y.weight", "x.lora_A.weight", "x.lora_B.weight"], r"x.lora_A.weight adapts x.weight, which is not there"),
        (["x.weight", "x.lora_A.a.weight", "x.lora_A.b.weight"], r"two tensors for one place: only one adapter"),
        (["x.weight", "x.base_layer.weight"], r"x.weight and x.base_layer.weight are two tensors"),
        (["x.weight", "x.lora_magnitude_vector.default.weight"], r"no part of a plain LoRA adapter"),
    ],
)
def test_names_that_cannot_be_merged(names, message):
    with pytest.raises(ValueError, match=message):
        lora_groups(names)


# -- adding -------------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_are_the_same_everywhere(tokenizer):
    """B = 0, so W x + s B A x = W x to the last bit; A is drawn from the seed, whatever was drawn before."""
    batch = batch_of(2, 0)
    model = tiny.build_tiny_model(tokenizer)
    wanted = losses_of(model, batch)
    models = [model, tiny.build_tiny_model(tokenizer), tiny.build_tiny_model(tokenizer)]
    for number, (adapted, seed) in enumerate(zip(models, (0, 0, 1), strict=True)):
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        add_lora(adapted, LoraSettings(parts=BOTH), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert type(adapted) is InternVLForConditionalGeneration
        assert torch.equal(losses_of(adapted.eval(), batch), wanted)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], value) for name, value in same.items())
    adapters = [name for name in first if ".lora_A." in name]
    assert len(adapters) == 2 * (6 + 7), "two layers each, 6 linear layers in one of the tower, 7 in a Qwen2 one"
    assert not any(torch.equal(first[name], other[name]) for name in adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_a_network_without_memory_have_their_values(tokenizer, dtype):
    """The bits that they have beside weights in memory; the weights stay where they were, and train if they did."""
    model = tiny.build_tiny_model(tokenizer).to(dtype)
    empty = empty_model(model.config, dtype=dtype, attention={"text_config": "sdpa", "vision_config": "sdpa"})
    for network in (model, empty):
        set_trainable(network, ["vision", "projector", "llm"])
        add_lora(network, LoraSettings(parts=BOTH), seed=3)
    ours, wanted = dict(empty.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == wanted.keys()
    for name, parameter in ours.items():
        adapter = ".lora_" in name
        assert parameter.is_meta is not adapter, name
        assert (parameter.dtype, parameter.requires_grad) == (wanted[name].dtype, wanted[name].requires_grad), name
        assert not adapter or torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [
        ("qwen2", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("starcoder2", {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"}),
    ],
)
def test_which_layers_get_adapters(tokenizer, model_type, wanted):
    """The original's; all linear layers of the blocks where it has none. Never embeddings, norms or head."""
    language = {**tiny.tiny_config().language_model, "model_type": model_type, "pad_token_id": 0}
    model = tiny.build_tiny_model(tokenizer, language_model=language)
    add_lora(model, LoraSettings(parts=["llm"]))
    adapted = {name.rpartition(".lora_A")[0] for name in trained(model) if ".lora_A." in name}
    assert {name.rpartition(".")[2] for name in adapted} == wanted
    assert all(name.startswith("model.language_model.layers.") for name in adapted)
    assert len(adapted) == 2 * len(wanted)


def test_targets_of_ones_own_and_misspelt_ones(tokenizer):
    """A target is the last name of a layer, or more of it; one that no layer has is named with the nearest."""
    model = tiny.build_tiny_model(tokenizer)
    add_lora(model, LoraSettings(parts=BOTH, targets={"vision": ["attention.q_proj"], "llm": ["v_proj", "up_proj"]}))
    adapted = {name.partition(".lora_")[0] for name in trained(model) if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj", "up_proj"}
    assert len(adapted) == 2 * (1 + 2), "q_proj of the tower alone"
    for name, nearest in (("qproj", "nearest are q_proj"), ("wqkv", "there are down_proj, gate_proj")):
        with pytest.raises(ValueError, match=rf"lora.targets.llm: no linear layer .* named {name}; {nearest}"):
            add_lora(tiny.build_tiny_model(tokenizer), LoraSettings(parts=["llm"], targets={"llm": [name]}))
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(model, LoraSettings(parts=["llm"]))
    with pytest.raises(ValueError, match="gives no part adapters"):
        add_lora(model, LoraSettings())


def test_only_adapters_of_a_part_train_beside_full_parts(model):
    """Vision with adapters, projector in full, language model frozen: in gradients, sizes and optimizer groups."""
    set_trainable(model, ["vision", "projector"])
    plain = {size.name: size for size in part_sizes(model)}
    add_lora(model, LoraSettings(parts=["vision"], rank=4))
    names = trained(model)
    assert {name for name in names if "vision_tower" in name} == {name for name in names if ".lora_" in name}
    assert not any("language_model" in name for name in names)
    sizes = {size.name: size for size in part_sizes(model)}
    # Two layers: q, k, v, out of 32 -> 32, fc1 32 -> 64, fc2 64 -> 32; rank * (in + out) each.
    assert sizes["vision"].trainable == 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
    assert sizes["vision"].total == plain["vision"].total + sizes["vision"].trainable
    assert sizes["projector"] == plain["projector"]
    assert sizes["llm"].trainable == 0
    groups = parameter_groups(
        {"vision": model.model.vision_tower.named_parameters()},
        lr={"vision": 1.0},
        weight_decay={"vision": 0.1},
        vision_layers=2,
        vision_layer_decay=0.5,
    )
    assert {group["name"]: (group["lr"], len(group["params"])) for group in groups} == {
        "vision": (1.0, 12),
        "vision_x0.5": (0.5, 12),
    }


def test_dropout_works_where_adapters_train(model):
    """Frozen modules are in eval mode; the dropout in front of an adapter is not one of them."""
    set_trainable(model, ["llm"])
    add_lora(model, LoraSettings(parts=["llm"], dropout=0.5))
    model.train()
    for module in frozen_modules(model):
        module.eval()
    layer = model.model.language_model.layers[0].self_attn.q_proj
    assert not layer.base_layer.training
    assert layer.lora_dropout["default"].training
    assert not model.model.vision_tower.training
    move_adapters(model)
    x = torch.randn(1, 5, 32)
    assert not torch.equal(layer(x), layer(x))
    model.eval()
    assert torch.equal(layer(x), layer(x))


def test_adapters_off_is_the_base_and_leaves_no_trace(tokenizer):
    """Trained adapters on and off; gradients are what they were also behind an error."""
    batch = batch_of(1)
    model = tiny.build_tiny_model(tokenizer).eval()
    base = losses_of(model, batch)
    add_lora(model, LoraSettings(parts=BOTH))
    model.eval()
    move_adapters(model)
    adapted, before = losses_of(model, batch), trained(model)
    assert not torch.allclose(adapted, base)
    with adapters_off(model):
        assert torch.equal(losses_of(model, batch), base)
        assert trained(model) == before
    assert torch.equal(losses_of(model, batch), adapted)
    with pytest.raises(RuntimeError, match="broken"), adapters_off(model):
        raise RuntimeError("broken")
    assert torch.equal(losses_of(model, batch), adapted)
    assert trained(model) == before


def test_adapters_are_float32_beside_a_bfloat16_network(tokenizer):
    """As the library's own; the network goes on in its dtype."""
    model = tiny.build_tiny_model(tokenizer, dtype="bfloat16")
    set_trainable(model, BOTH)
    add_lora(model, LoraSettings(parts=BOTH))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert model.dtype == torch.bfloat16
    assert losses_of(model.eval(), batch_of(1)).isfinite().all()


# -- merged weights and the adapter's folder ----------------------------------------------------------------------


@pytest.mark.parametrize("others", [None, [*BOTH, "projector"]])
def test_the_adapter_s_folder_is_peft_s(tokenizer, tmp_path, others):
    """Read by plain peft and by plain transformers beside the base: the same logits as the merged weights, to 1e-5;
    and peft's own merge gives the same weights, to 1e-6. Where a part trained in full a note says so.
    """
    base = tiny.build_tiny_model(tokenizer, attention="sdpa")
    base.save_pretrained(tmp_path / "base")
    stage = InstructionTuning(
        lambda: tiny.build_tiny_model(tokenizer, attention="sdpa"),
        trainable=others,
        lora=LoraSettings(parts=BOTH, rank=4, alpha=12),
    )
    stage.configure_model()
    move_adapters(stage.internvl)
    save_adapter(stage, stage.internvl.state_dict(), str(tmp_path / "base"), tmp_path / "adapter")
    merged = stage.merged(stage.internvl.state_dict())
    assert merged.keys() == base.state_dict().keys()

    note = tmp_path / "adapter/README.md"
    assert note.is_file() == (others is not None)
    if others is not None:
        assert "projector trained in full" in note.read_text()
    ids = {"input_ids": torch.arange(4, 20).unsqueeze(0)}
    image = torch.full((1, 4), base.config.image_token_id)
    ids["input_ids"] = torch.cat([image, ids["input_ids"]], dim=1)
    pixels = torch.randn(1, 3, tiny.TILE_SIZE, tiny.TILE_SIZE)

    def plain():
        return InternVLForConditionalGeneration.from_pretrained(tmp_path / "base").eval()

    def logits(network):
        with torch.no_grad():
            return network(**ids, pixel_values=pixels).logits

    network = plain()
    unadapted = logits(network)
    network.load_state_dict(merged)
    wanted = logits(network)
    assert not torch.allclose(unadapted, wanted, atol=1e-2)
    by_peft = PeftModel.from_pretrained(plain(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(by_peft), wanted, atol=1e-5, rtol=1e-5)
    by_transformers = plain()
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(by_transformers.eval()), wanted, atol=1e-5, rtol=1e-5)
    unloaded = by_peft.merge_and_unload().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, unloaded[name], atol=1e-6, rtol=1e-6, msg=name)


def test_a_base_that_peft_cannot_read_is_noted(tokenizer, tmp_path):
    """Trained on a checkpoint of the original's layout."""
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat"}')
    stage = InstructionTuning(lambda: tiny.build_tiny_model(tokenizer), lora=LoraSettings(parts=["llm"]))
    stage.configure_model()
    save_adapter(stage, stage.internvl.state_dict(), str(tmp_path), tmp_path / "adapter")
    assert "Write the base with `ivl-convert`" in (tmp_path / "adapter/README.md").read_text()


def test_without_adapters_nothing_is_merged(model):
    stage = MLPWarmup(model)
    stage.configure_model()
    state_dict = stage.internvl.state_dict()
    assert stage.merged(state_dict) is state_dict
    checkpoint = {}
    stage.on_save_checkpoint(checkpoint)
    assert "frozen_base" not in checkpoint
    assert len(stage.state_dict()) >= len(state_dict)


# -- what a stage makes of it -------------------------------------------------------------------------------------


def test_what_a_stage_trains(tokenizer):
    """By default exactly the parts with adapters; a stage's own choice without."""

    def parts(stage_class, **options):
        return stage_class(lambda: tiny.build_tiny_model(tokenizer), **options).trainable

    assert parts(MLPWarmup) == ("projector",)
    assert parts(MLPWarmup, lora=LoraSettings(parts=["llm"])) == ("llm",)
    assert parts(MLPWarmup, lora=LoraSettings(parts=["llm"]), trainable=["projector", "llm"]) == ("projector", "llm")
    with pytest.raises(ValueError, match=r"stage.trainable=\['projector'\] leaves out llm of lora.parts=\['llm'\]"):
        parts(MLPWarmup, lora=LoraSettings(parts=["llm"]), trainable=["projector"])


@pytest.mark.parametrize("parts", [["llm"], ["vision"]])
def test_the_tower_runs_without_a_tile_where_its_adapters_train(tokenizer, parts):
    """What trains gets a gradient of zero rather than none; what does not train need not run."""
    stage = InstructionTuning(lambda: tiny.build_tiny_model(tokenizer), lora=LoraSettings(parts=parts))
    stage.configure_model()
    assert stage.root.always_run_vision == ("vision" in parts)
    stage.root(batch_of(0))[0].backward()
    assert all(parameter.grad is not None for parameter in stage.internvl.parameters() if parameter.requires_grad)


def saved(stage):
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_checkpoint_holds_what_trains_and_loads_strictly(tokenizer):
    """Projector and adapters are there, frozen weights are not; the others come from the network, every name is
    needed, and another base is refused by name.
    """

    def adapted(seed=0, **options):
        settings = {"lora": LoraSettings(parts=["llm"]), "trainable": ["projector", "llm"], **options}
        stage = InstructionTuning(lambda: tiny.build_tiny_model(tokenizer, seed=seed), **settings)
        stage.configure_model()
        return stage

    first = adapted()
    move_adapters(first.internvl)
    with torch.no_grad():
        first.internvl.model.multi_modal_projector.linear_1.weight.add_(1.0)
    checkpoint = saved(first)
    network = {name for name in checkpoint["state_dict"] if name.startswith("root.internvl.")}
    assert network == {f"root.internvl.{name}" for name in trained(first.internvl)}

    second = adapted()
    second.on_load_checkpoint(checkpoint)
    second.load_state_dict(checkpoint["state_dict"], strict=True)
    ours, wanted = second.internvl.state_dict(), first.internvl.state_dict()
    assert len(ours) == len(wanted) > 60
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())

    name = next(name for name in network if ".lora_B." in name)
    short = {key: value for key, value in checkpoint["state_dict"].items() if key != name}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B"):
        adapted().load_state_dict(short, strict=True)
    with pytest.raises(ValueError, match=r"saved beside a different base: \d+ of \d+ frozen tensors differ"):
        adapted(seed=1).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"first model.multi_modal_projector.*not frozen then"):
        adapted(trainable=None).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="saved with LoRA adapters, this stage has none"):
        adapted(lora=None).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="saved without LoRA adapters, this stage has some"):
        adapted().on_load_checkpoint(saved(adapted(lora=None)))


def test_a_fingerprint_sees_shape_type_and_the_last_value():
    """1,000 values, of which 64 are looked at; a token that was added last is the last row."""
    weights = {"a": torch.arange(1000.0).view(10, 100), "empty": torch.zeros(0)}
    then = fingerprint(weights.items())
    check_fingerprint(then, fingerprint(weights.items()), "it has")
    for changed in (weights["a"].view(100, 10), weights["a"].half(), weights["a"].clone().index_fill_(0, LAST, 7.0)):
        with pytest.raises(ValueError, match=r"it has a different base: 1 of 2 frozen tensors differ, first a \("):
            check_fingerprint(then, fingerprint({**weights, "a": changed}.items()), "it has")


LAST = torch.tensor([9])


# -- 4 bits -------------------------------------------------------------------------------------------------------


def test_what_is_missing_for_4_bits_is_named(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'ivl-lightning\[qlora\]'"):
        quantize_language_model(model, CPU)


def test_a_ready_network_cannot_be_quantized(model):
    with pytest.raises(ValueError, match=r"lora.quantize=nf4 with a ready network: give a function"):
        InstructionTuning(model, lora=LoraSettings(parts=["llm"], quantize="nf4"))


@needs_bitsandbytes
def test_merged_weights_of_a_4_bit_network_are_those_of_the_source(tokenizer):
    """The base is rounded to 16 values in the network and whole in the merged weights: W + s B A with the W that was
    read. Sizes are counted in weights, not in bytes; a source that has changed meanwhile is refused.
    """
    seeds = [0]
    stage = InstructionTuning(
        lambda: tiny.build_tiny_model(tokenizer, seed=seeds[0]),
        lora=LoraSettings(parts=["llm"], targets={"llm": ["q_proj"]}, quantize="nf4"),
    )
    stage.configure_model()
    plain = tiny.build_tiny_model(tokenizer)
    assert [size.total for size in part_sizes(stage.internvl)] == [
        size.total + (size.name == "llm") * 2 * 16 * (32 + 32) for size in part_sizes(plain)
    ]
    move_adapters(stage.internvl)
    state_dict = stage.internvl.state_dict()
    assert len(four_bit_names(state_dict)) == 2 * 7
    a, b = (
        state_dict[f"model.language_model.layers.1.self_attn.q_proj.lora_{side}.default.weight"].clone()
        for side in "AB"
    )
    merged = stage.merged(dict(state_dict))
    base = plain.state_dict()
    assert merged.keys() == base.keys()
    for name, value in base.items():
        if "q_proj" not in name or "vision" in name or name.endswith("bias"):
            assert torch.equal(merged[name], value), name
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[name], base[name] + lora_scale(stage.lora) * (b @ a))
    seeds[0] = 1
    with pytest.raises(ValueError, match="the network was built of a different base: 14 of 14"):
        stage.merged(dict(state_dict))


@needs_bitsandbytes
def test_gradients_pass_4_bit_layers_also_after_validation(tokenizer):
    """Inference without gradients must not leave weights packed in a way that cuts those of training.

    A gradient that reaches the first block has passed the second one; it is the same before and after.
    """
    model = tiny.build_tiny_model(tokenizer)
    quantize_language_model(model, CPU)
    add_lora(model, LoraSettings(parts=["llm"], dropout=0.0))
    move_adapters(model)
    batch = batch_of(1)

    def first_block():
        model.zero_grad()
        InternVLWithLoss(model, NextTokenLoss())(batch)[0].backward()
        return model.model.language_model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad.clone()

    before = first_block()
    assert before.abs().sum() > 0
    losses_of(model.eval(), batch)
    assert torch.equal(first_block(), before)
    assert torch.equal(first_block(), before)


# -- settings -----------------------------------------------------------------------------------------------------


def run_config(stage=None, **changes):
    settings = {
        "seed": 0,
        "run_dir": "RUN",
        "stage": schema.StageConfig(
            _target_="ivl_lightning.stages.instruction_tuning.InstructionTuning", name="s", **(stage or {})
        ),
        "model": schema.ModelConfig(),
        "data": schema.DataConfig(meta="m"),
        "loss": schema.LossConfig(),
        "optim": schema.OptimConfig(),
        "trainer": schema.TrainerConfig(),
        "strategy": schema.StrategyConfig(),
    }
    return schema.RunConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"alpha": 0}, "lora.alpha=0 must be at least 1"),
        ({"dropout": 1.0}, "lora.dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, "lora.dropout=-0.1"),
        ({"parts": ["llm", "llm"]}, "names a part twice"),
        ({"targets": {"llm": []}}, r"lora.targets.llm=\[\] gives no layer an adapter"),
        ({"targets": {"vision": ["fc1"]}}, r"lora.targets.vision=\['fc1'\] has no effect with lora.parts=\['llm'\]"),
        ({"parts": ["vision"], "quantize": "nf4"}, "lora.quantize=nf4 is for the language model"),
        ({"parts": [], "rank": 8}, r"lora.rank=8 has no effect with lora.parts=\[\]: add lora=llm"),
        ({"parts": [], "quantize": "nf4"}, "lora.quantize=nf4 has no effect"),
    ],
)
def test_wrong_settings_are_named(model, lora, message):
    """On the command line before anything is loaded, and by the function itself."""
    settings = LoraSettings(**{"parts": ["llm"], **lora})
    with pytest.raises(ConfigError, match=message):
        validate(run_config(lora=settings))
    with pytest.raises(ValueError, match=message):
        add_lora(model, settings)


LLM = LoraSettings(parts=["llm"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LLM, "stage": {"trainable": ["vision"]}}, r"trainable=\['vision'\] leaves out llm of lora.parts"),
        (
            {"lora": LoraSettings(parts=["vision"]), "stage": {"trainable_vision_layers": 2}},
            "stage.trainable_vision_layers=2 chooses layers that train in full",
        ),
        (
            {"lora": LoraSettings(parts=["llm"], quantize="nf4"), "strategy": schema.StrategyConfig(name="fsdp")},
            "lora.quantize=nf4 cannot be sharded by strategy=fsdp",
        ),
    ],
)
def test_settings_that_contradict_others(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(run_config(**changes))


@pytest.mark.parametrize(
    ("lora", "trainable", "message"),
    [
        (LoraSettings(), None, r"reference=adapter_off needs adapters, but lora.parts=\[\]"),
        (LLM, ["llm", "projector"], "trains projector in full beside"),
    ],
)
def test_adapter_off_needs_a_reference_that_stands_still(tokenizer, lora, trainable, message):
    parts = {"p": {"weight": 1.0, "head": {"_target_": "x"}}}
    preference = schema.PreferenceConfig(reference="adapter_off", parts=parts)
    stage = {"rows": "pairs", "trainable": trainable}
    with pytest.raises(ConfigError, match=message):
        validate(run_config(lora=lora, preference=preference, stage=stage))
    validate(run_config(lora=lora, preference=preference, stage={"trainable": trainable}))
    with pytest.raises(ValueError, match=message):
        MixedPreference(lambda: None, reference="adapter_off", lora=lora, trainable=trainable)


def test_settings_decide_but_runs_without_lora_stay_as_they_were():
    """A configuration and a done.json of a version that knew no LoRA are read and found the same."""
    plain = deciding_settings(run_config())
    assert not [key for key in plain if key.startswith("lora")]
    earlier = {key: value for key, value in asdict(run_config()).items() if key != "lora"}
    assert load(schema.RunConfig, earlier) == run_config()
    adapted = deciding_settings(run_config(lora=LLM))
    assert adapted["lora.parts"] == ["llm"]
    assert {key: value for key, value in adapted.items() if not key.startswith("lora")} == plain
    assert deciding_settings(run_config(lora=LoraSettings(parts=["llm"], rank=8))) != adapted


def test_adapters_save_the_gradients_of_weights(model):
    """Forward 1, backward through activations 1, of weights 1: an adapted part costs 2 where a full one costs 3."""
    stage = schema.StageConfig(_target_="ivl_lightning.stages.instruction_tuning.InstructionTuning", name="s")
    full, adapted, llm = (
        cost_of(schema.ModelConfig(), stage, model.config, lora)
        for lora in (None, LoraSettings(parts=BOTH), LoraSettings(parts=["llm"]))
    )
    assert adapted == pytest.approx([value * 2 / 3 for value in full])
    assert llm == pytest.approx([full[0] * 2 / 3, full[1] * 2 / 3, full[2] / 3])


def test_linear_layers_stay_linear_for_whoever_looks(model):
    """The head's weight is read by the loss, so it never gets an adapter."""
    add_lora(model, LoraSettings(parts=BOTH))
    assert type(model.lm_head) is nn.Linear
    assert merged_state_dict(model.state_dict(), 2.0)["lm_head.weight"].shape == model.lm_head.weight.shape
