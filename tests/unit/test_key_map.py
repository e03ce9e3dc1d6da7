"""The table between the layouts, both ways: how tensors are divided, which names belong together, what configs say."""

import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import InternVLConfig, Phi3Config

from ivl_lightning.checkpoints import key_map
from ivl_lightning.checkpoints.files import open_folder
from ivl_lightning.checkpoints.key_map import HF_PREFIXES, KeyTable, hf_name, key_table, native_name
from ivl_lightning.checkpoints.source import CheckpointError, MemorySource, renamed
from ivl_lightning.checkpoints.splits import GroupedRows, RowBlocks, Split, Whole
from ivl_lightning.checkpoints.views import AsNative, AsOriginal, check_complete
from ivl_lightning.models.checkpoint import open_checkpoint, table_of
from ivl_lightning.models.original_config import RECORD, from_original, is_transposed, record, to_original
from ivl_lightning.models.parts import text_config, tile_size, vision_config
from ivl_lightning.models.streaming import empty_model
from tests import originals

FILE = Path("somewhere/config.json")
QWEN2 = "Qwen2ForCausalLM"
ATTENTION = {"text_config": "sdpa", "vision_config": "sdpa"}


# -- rows ---------------------------------------------------------------------------------------------------------


def test_grouped_rows_by_hand():
    """4 query heads on 2 key-value heads of width 1: the rows are q0 q1 k0 v0, then q2 q3 k1 v1."""
    wqkv = torch.tensor([[0.0], [1], [2], [3], [4], [5], [6], [7]])
    query, key, value = GroupedRows(heads=4, kv_heads=2).split(wqkv)
    assert query.flatten().tolist() == [0, 1, 4, 5]
    assert key.flatten().tolist() == [2, 6]
    assert value.flatten().tolist() == [3, 7]


def test_grouped_rows_of_wider_heads_and_of_a_bias():
    """2 query heads on 1 key-value head of width 2: q0 is rows 0 and 1, q1 rows 2 and 3, k 4 and 5, v 6 and 7."""
    bias = torch.arange(8.0)
    query, key, value = GroupedRows(heads=2, kv_heads=1).split(bias)
    assert query.tolist() == [0, 1, 2, 3]
    assert key.tolist() == [4, 5]
    assert value.tolist() == [6, 7]


def test_every_head_with_its_own_key_is_not_three_blocks():
    """2 heads on 2: q0 k0 v0 q1 k1 v1, where the vision tower has q0 q1 k0 k1 v0 v1."""
    rows = torch.arange(6.0)
    assert [part.tolist() for part in GroupedRows(2, 2).split(rows)] == [[0, 3], [1, 4], [2, 5]]
    assert [part.tolist() for part in RowBlocks(3).split(rows)] == [[0, 1], [2, 3], [4, 5]]


def columns(draw) -> tuple[int, ...]:
    """Of a weight or of a bias."""
    return draw(st.sampled_from([(), (1,), (3,)]))


@st.composite
def grouped(draw) -> tuple[GroupedRows, tuple[tuple[int, ...], ...]]:
    """A rule, and shapes of q, k, v that it fits."""
    kv_heads, group, width = (draw(st.integers(min_value=1, max_value=4)) for _ in range(3))
    rest = columns(draw)
    keys = (kv_heads * width, *rest)
    return GroupedRows(kv_heads * group, kv_heads), ((kv_heads * group * width, *rest), keys, keys)


@st.composite
def blocks(draw) -> tuple[RowBlocks, tuple[tuple[int, ...], ...]]:
    count, rows = draw(st.integers(min_value=1, max_value=4)), draw(st.integers(min_value=1, max_value=5))
    return RowBlocks(count), ((rows, *columns(draw)),) * count


@settings(deadline=None, max_examples=100)
@given(st.one_of(grouped(), blocks()))
def test_joining_undoes_splitting_and_splitting_undoes_joining(case):
    """Every number goes to one place; shapes are known without numbers."""
    split, shapes = case
    numbers = torch.arange(float(sum(torch.Size(shape).numel() for shape in shapes))).split(
        [torch.Size(shape).numel() for shape in shapes]
    )
    parts = tuple(values.reshape(shape) for values, shape in zip(numbers, shapes, strict=True))
    whole = split.join(parts)
    assert sorted(whole.flatten().tolist()) == sorted(torch.cat(numbers).tolist())
    assert all(torch.equal(here, there) for here, there in zip(split.split(whole), parts, strict=True))
    assert torch.equal(split.join(split.split(whole)), whole)
    assert [part.shape for part in split.split(whole.to("meta"))] == [part.shape for part in parts]
    assert split.join([part.to("meta") for part in parts]).shape == whole.shape


def test_a_whole_tensor_stays_as_it_is():
    tensor = torch.arange(4.0)
    (part,) = Whole().split(tensor)
    assert part is tensor
    assert Whole().join([tensor]) is tensor


@pytest.mark.parametrize(
    ("split", "rows", "message"),
    [
        (GroupedRows(6, 2), 81, "81 rows are not 2 groups of 3 query heads, a key and a value"),
        (GroupedRows(6, 3), 80, "num_attention_heads or num_key_value_heads of the configuration is wrong"),
        (RowBlocks(3), 80, "80 rows are not 3 equal blocks"),
    ],
)
def test_rows_that_cannot_be_divided(split: Split, rows: int, message: str):
    with pytest.raises(ValueError, match=message):
        split.split(torch.zeros(rows, 2))


@pytest.mark.parametrize(
    ("split", "rows", "message"),
    [
        (GroupedRows(4, 2), (4, 2, 3), r"\[\(4, 1\), \(2, 1\), \(3, 1\)\] do not belong to 4 query heads and 2 key"),
        (GroupedRows(4, 2), (2, 2, 2), "do not belong to 4 query heads and 2 key-value heads"),
        (RowBlocks(3), (2, 2, 1), "differ in shape"),
    ],
)
def test_parts_that_cannot_be_joined(split: Split, rows: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        split.join([torch.zeros(count, 1) for count in rows])


# -- names of all tensors -----------------------------------------------------------------------------------------


def native(config: originals.Config) -> tuple[InternVLConfig, dict[str, Tensor]]:
    """Configuration and parameters of transformers' model, without memory."""
    internvl = from_original(config, FILE)
    model = empty_model(internvl, dtype=torch.float32, attention=ATTENTION)
    return internvl, {name: value.detach() for name, value in model.named_parameters()}


@pytest.fixture(params=originals.FAMILIES)
def family(request) -> originals.Config:
    return originals.family_config(request.param)


def test_native_names_become_the_originals_and_come_back(family):
    """All parameters, each in one place, in shapes that were written down by hand; and the other way round."""
    internvl, parameters = native(family)
    table = table_of(internvl)
    original = AsOriginal(MemorySource(parameters), table)
    assert {name: tuple(original.meta(name).shape) for name in original.names()} == originals.shapes(family)
    back = AsNative(original, table)
    assert Counter(back.names()) == Counter(list(parameters))
    assert {name: back.meta(name).shape for name in back.names()} == {
        name: value.shape for name, value in parameters.items()
    }


def test_a_tensor_comes_back_with_its_own_numbers(family):
    """Each native parameter is filled with a number of its own; all of them are found again after both ways."""
    internvl, parameters = native(family)
    numbered = {name: torch.full(value.shape, float(place)) for place, (name, value) in enumerate(parameters.items())}
    table = table_of(internvl)
    original = AsOriginal(MemorySource(numbered), table)
    written = MemorySource({name: original.read(name) for name in original.names()})
    back = AsNative(written, table)
    assert all(torch.equal(back.read(name), value) for name, value in numbered.items())


def test_internlm2_with_biases():
    """Its class has them by default; wqkv's bias is divided as its weight is."""
    config = originals.family_config("internlm2_6b")
    del config["llm_config"]["bias"]
    internvl, parameters = native(config)
    original = AsOriginal(MemorySource(parameters), table_of(internvl))
    assert "language_model.model.layers.1.attention.wqkv.bias" in original.names()
    assert {name: tuple(original.meta(name).shape) for name in original.names()} == originals.shapes(config)


def every_rule() -> list[key_map.Rule]:
    return [*key_map.VISION, *key_map.PROJECTOR, *key_map._SAME_LANGUAGE, *key_map._internlm2(6, 2)]


def test_every_rule_is_used():
    """By a family; a rule that is not would be a guess nobody has checked."""
    names = {name for family in originals.FAMILIES for name in originals.shapes(originals.family_config(family))}
    for rule in every_rule():
        table = KeyTable((rule,))
        assert any(table.to_native(name) for name in names), rule


def test_every_name_has_one_rule(family):
    """Asked one by one, exactly one rule of the family's takes a name, original or native."""
    kind = family["llm_config"]["architectures"][0]
    language = key_map._internlm2(6, 2) if kind == key_map.INTERNLM2 else key_map._SAME_LANGUAGE
    tables = [KeyTable((rule,)) for rule in (*key_map.VISION, *key_map.PROJECTOR, *language)]
    for name in originals.shapes(family):
        assert sum(table.to_native(name) is not None for table in tables) == 1, name
    for name in native(family)[1]:
        assert sum(table.to_original(name) is not None for table in tables) == 1, name


@settings(deadline=None, max_examples=60)
@given(st.integers(min_value=0, max_value=10**6), st.sampled_from(["weight", "bias"]))
def test_layers_keep_their_number(layer, kind):
    table = key_table("InternLM2ForCausalLM", 6, 2)
    for original, parts in (
        (f"vision_model.encoder.layers.{layer}.attn.qkv.{kind}", 3),
        (f"vision_model.encoder.layers.{layer}.norm1.{kind}", 1),
        (f"language_model.model.layers.{layer}.attention.wqkv.{kind}", 3),
    ):
        found = table.to_native(original)
        assert found is not None
        assert len(found[0]) == parts
        assert all(f".{layer}." in name and name.endswith(kind) for name in found[0])
        assert {table.to_original(name) for name in found[0]} == {original}


def test_a_name_is_taken_whole():
    """Neither a longer name nor a part of one; a dot of the table is a dot."""
    table = key_table("InternLM2ForCausalLM", 6, 2)
    for name in (
        "mlp1.0.weight.more",
        "x.mlp1.0.weight",
        "mlp1.2.weight",
        "mlp1x0.weight",
        "vision_model.encoder.layers.one.ls1",
        "vision_model.encoder.layers.0.ls3",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
    ):
        assert table.to_native(name) is None, name
        assert table.to_original(name) is None, name


def test_an_unknown_language_model_is_named():
    with pytest.raises(ValueError, match=r"llm_config.architectures names 'Gemma2ForCausalLM'; known are InternLM2"):
        key_table("Gemma2ForCausalLM", 6, 2)


# -- what is missing, surplus or there twice ----------------------------------------------------------------------


def qwen2() -> tuple[dict[str, Tensor], KeyTable]:
    shapes = originals.shapes(originals.family_config("qwen2_300m"))
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, key_table(QWEN2, 6, 2)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """What the network of `qwen2` has."""
    return {name: tuple(value.shape) for name, value in native(originals.family_config("qwen2_300m"))[1].items()}


def test_surplus_tensors_are_named():
    tensors, table = qwen2()
    tensors |= {"vision_model.head.weight": torch.empty(1), "qllama.query": torch.empty(1)}
    with pytest.raises(CheckpointError, match=r"a.bin holds 2 tensors .*: qllama.query, vision_model.head.weight"):
        AsNative(MemorySource(tensors, "a.bin"), table)


def test_a_layer_more_than_the_config_says_is_named():
    """The table knows its names, the model does not."""
    tensors, table = qwen2()
    tensors["language_model.model.layers.2.input_layernorm.weight"] = torch.empty(48)
    source = AsNative(MemorySource(tensors, "a.bin"), table)
    with pytest.raises(CheckpointError, match=r"a.bin holds 1 tensors .*model.language_model.layers.2.input_layernorm"):
        check_complete(source, expected_shapes(), "config.json")


def test_missing_tensors_are_named():
    """A fused tensor that is missing is three native ones."""
    tensors, table = qwen2()
    del tensors["vision_model.encoder.layers.1.attn.qkv.bias"], tensors["mlp1.3.bias"]
    with pytest.raises(CheckpointError) as caught:
        check_complete(AsNative(MemorySource(tensors), table), expected_shapes(), "here/config.json")
    layer = "model.vision_tower.encoder.layer.1.attention."
    for name in ("model.multi_modal_projector.linear_2.bias", *(f"{layer}{part}_proj.bias" for part in "qkv")):
        assert name in str(caught.value)
    assert "here/config.json" in str(caught.value)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_part_of_a_fused_tensor_that_is_missing_is_named(part):
    internvl, parameters = native(originals.family_config("internlm2_6b"))
    name = f"model.language_model.layers.0.self_attn.{part}_proj.weight"
    del parameters[name]
    with pytest.raises(CheckpointError, match=re.escape(name)):
        AsOriginal(MemorySource(parameters), table_of(internvl))


def test_native_tensors_without_a_place_in_the_original_are_named():
    internvl, parameters = native(originals.family_config("qwen2_300m"))
    parameters["model.vision_tower.layernorm.weight"] = torch.empty(1)
    with pytest.raises(CheckpointError, match=r"model\.vision_tower\.layernorm\.weight"):
        AsOriginal(MemorySource(parameters), table_of(internvl))


def test_a_tensor_under_two_names_is_refused():
    """As it is called in memory and in files; neither is taken for the other's value."""
    both = {
        "vision_tower.embeddings.cls_token": torch.zeros(1),
        "model.vision_tower.embeddings.cls_token": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as caught:
        renamed(MemorySource(both, "a.bin"), native_name)
    for word in (*both, "a.bin", "remove one of them"):
        assert word in str(caught.value)


def test_shapes_that_differ_are_named():
    tensors, table = qwen2()
    tensors["language_model.model.norm.weight"] = torch.empty(49, device="meta")
    with pytest.raises(
        CheckpointError, match=r"a.bin: model.language_model.norm.weight has the shape \(49,\).* \(48,\)"
    ):
        check_complete(AsNative(MemorySource(tensors, "a.bin"), table), expected_shapes(), "config.json")


def test_rotary_frequencies_that_old_releases_store_are_computed():
    """They follow from rope_theta; InternLM2 and early Llama checkpoints hold them all the same."""
    tensors, table = qwen2()
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    source = AsNative(MemorySource({**tensors, name: torch.empty(4)}), table)
    assert source.left_out == [name]
    assert Counter(source.names()) == Counter(AsNative(MemorySource(tensors), table).names())


# -- names in files of transformers -------------------------------------------------------------------------------


def test_hf_names_are_those_that_the_library_writes(model, tmp_path: Path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        written = set(file.keys())
    assert {hf_name(name) for name, _ in model.named_parameters()} == written
    assert {native_name(name) for name in written} == {name for name, _ in model.named_parameters()}


def test_hf_names_by_hand():
    pairs = {
        "model.vision_tower.encoder.layer.3.lambda_1": "vision_tower.encoder.layer.3.lambda_1",
        "model.multi_modal_projector.linear_2.bias": "multi_modal_projector.linear_2.bias",
        "model.language_model.layers.0.mlp.up_proj.weight": "language_model.model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    }
    for in_memory, on_disk in pairs.items():
        assert hf_name(in_memory) == on_disk
        assert native_name(on_disk) == in_memory


@settings(deadline=None)
@given(st.sampled_from(HF_PREFIXES), st.text(alphabet="abz.1_", min_size=1))
def test_hf_names_come_back(prefixes, rest):
    """Both ways; a name that is native already stays."""
    name = prefixes[0] + rest
    assert native_name(hf_name(name)) == name
    assert native_name(name) == name


def test_every_hf_tensor_of_a_folder_is_seen(model, tmp_path: Path, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = open_checkpoint(tmp_path).tensors
    assert Counter(tensors.names()) == Counter(name for name, _ in model.named_parameters())
    assert len(open_folder(tmp_path).names()) == len(tensors.names())


# -- configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", originals.GOLDEN)
def test_a_recorded_config_comes_back_whole(name):
    """Fields that transformers has no place for too; nothing is added to what the original's code wrote."""
    config = originals.golden(name).config
    assert to_original(from_original(config, FILE), template="unused") == config


def test_a_config_comes_back_after_json(family):
    """The record travels in transformers' config.json."""
    written = json.loads(from_original(family, FILE).to_json_string())
    back = to_original(InternVLConfig.from_dict(written), template="unused")
    assert back == {
        **family,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "hidden_size": 48,
        "tie_word_embeddings": False,
    }


def without_record(config: originals.Config) -> InternVLConfig:
    internvl = from_original(config, FILE)
    setattr(internvl, RECORD, None)
    return internvl


def test_a_config_without_a_record_says_the_same(family):
    """All that decides the network; InternLM2 is then a Llama, and only its own field `bias` another name."""
    made = to_original(without_record(family), template="internvl2_5")
    for key in ("downsample_ratio", "select_layer", "force_image_size", "ps_version", "template"):
        assert made[key] == family[key]
    assert made["vision_config"].items() >= family["vision_config"].items()
    renamed_fields = ("architectures", "model_type", "bias")
    language = {key: value for key, value in family["llm_config"].items() if key not in renamed_fields}
    assert made["llm_config"].items() >= language.items()


def test_rope_scaling_of_phi3_is_as_its_original_class_takes_it():
    """`modeling_phi3.py` of the original knows `su` and not `longrope`, its config three fields and no more."""
    factors = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 16.0]}
    made = to_original(without_record(originals.family_config("phi3_300m")), template="phi3-chat")
    assert made["llm_config"]["rope_scaling"] == {"type": "su", **factors}
    assert made["llm_config"]["original_max_position_embeddings"] == 32


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_rope_scaling_has_two_fields(kind):
    """Type and factor: the original's Llama and InternLM2 classes refuse more."""
    config = originals.family_config("llama_6b")
    config["llm_config"]["rope_scaling"] = {"type": kind, "factor": 3.0}
    made = to_original(without_record(config), template="internvl2_5")
    assert made["llm_config"]["rope_scaling"] == {"type": kind, "factor": 3.0}


SMALL = st.integers(min_value=1, max_value=64)
RATE = st.floats(min_value=0.0, max_value=0.5)
VISION_VALUES = {
    # Divisors of the width, 24.
    "num_attention_heads": st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    "intermediate_size": SMALL,
    "num_hidden_layers": SMALL,
    "hidden_act": st.sampled_from(["gelu", "silu"]),
    "norm_type": st.sampled_from(["layer_norm", "rms_norm"]),
    "layer_norm_eps": st.floats(min_value=1e-8, max_value=1e-3),
    "attention_dropout": RATE,
    "initializer_range": RATE,
    "qkv_bias": st.booleans(),
    "qk_normalization": st.booleans(),
    "dropout": RATE,
    "initializer_factor": st.floats(min_value=0.01, max_value=2.0),
}
LANGUAGE_VALUES = {
    "vocab_size": st.integers(min_value=10, max_value=10**6),
    "intermediate_size": SMALL,
    "num_hidden_layers": SMALL,
    "hidden_act": st.sampled_from(["gelu", "silu"]),
    "max_position_embeddings": st.integers(min_value=8, max_value=10**6),
    "rms_norm_eps": st.floats(min_value=1e-8, max_value=1e-3),
    "initializer_range": RATE,
    "rope_theta": st.floats(min_value=2.0, max_value=1e7),
    "rope_scaling": st.sampled_from([None, {"type": "dynamic", "factor": 2.0}]),
    "bos_token_id": st.one_of(st.none(), st.integers(min_value=0, max_value=9)),
    "eos_token_id": st.one_of(st.none(), st.integers(min_value=0, max_value=9)),
    "pad_token_id": st.one_of(st.none(), st.integers(min_value=0, max_value=9)),
}


@settings(deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries({}, optional=VISION_VALUES),
    st.fixed_dictionaries({}, optional=LANGUAGE_VALUES),
    st.sampled_from(["qwen2_300m", "llama_6b"]),
    st.sampled_from([-1, -2, 1]),
    st.booleans(),
)
def test_any_settings_come_back(vision, language, name, layer, recorded):
    """With the record beside it or with nothing but transformers' own fields."""
    config = originals.family_config(name, select_layer=layer)
    config["vision_config"] |= vision
    config["llm_config"] |= language
    internvl = from_original(config, FILE) if recorded else without_record(config)
    made = to_original(internvl, template="internvl2_5")
    assert made["select_layer"] == layer
    assert made["vision_config"].items() >= config["vision_config"].items()
    assert {key: made["llm_config"].get(key) for key in config["llm_config"]} == config["llm_config"]


def test_a_changed_config_is_written_as_it_is_now(family):
    """Over the record: a grown vocabulary, other tiles, another theta, and another layer of features."""
    internvl = from_original(family, FILE)
    text_config(internvl).vocab_size = 500
    text_config(internvl).rope_parameters["rope_theta"] = 77.0
    vision_config(internvl).image_size = [112, 112]
    internvl.vision_feature_layer = -2
    made = to_original(internvl, template="unused")
    assert made["llm_config"]["vocab_size"] == 500
    assert made["llm_config"]["rope_theta"] == 77.0
    assert made["vision_config"]["image_size"] == made["force_image_size"] == 112
    assert made["select_layer"] == -2
    assert made["llm_config"].get("rope_scaling") == family["llm_config"].get("rope_scaling")
    assert record(internvl) == family


def test_adapters_are_merged_so_their_ranks_are_zero():
    config = originals.family_config("qwen2_300m", use_llm_lora=16, use_backbone_lora=8)
    made = to_original(from_original(config, FILE), template="unused")
    assert made["use_llm_lora"] == made["use_backbone_lora"] == 0


def bare(language: dict[str, Any]) -> originals.Config:
    """A config.json that says no more than a class without defaults of its own needs."""
    sizes = {"vocab_size": 90, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1}
    return {
        "model_type": "internvl_chat",
        "vision_config": {},
        "llm_config": {**sizes, "num_attention_heads": 6, **language},
    }


def test_defaults_of_the_vision_tower_are_the_6bs_at_224_pixels():
    """Class `InternVisionConfig` of the original."""
    internvl = from_original(bare({"architectures": ["LlamaForCausalLM"]}), FILE)
    expected = {
        "hidden_size": 3200,
        "num_hidden_layers": 48,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "norm_type": "rms_norm",
        "use_qk_norm": True,
        "attention_bias": False,
        "layer_scale_init_value": 0.1,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "num_channels": 3,
    }
    tower = vision_config(internvl)
    assert {key: getattr(tower, key) for key in expected} == expected
    assert tile_size(internvl) == 224
    assert tower.patch_size[0] == 14


def test_defaults_of_the_whole_model():
    """Class `InternVLChatConfig`: v1, although every release since 1.5 is v2, and features of the last layer."""
    internvl = from_original(bare({"architectures": ["LlamaForCausalLM"]}), FILE)
    assert is_transposed(internvl)
    assert internvl.vision_feature_layer == -1
    assert internvl.downsample_ratio == 0.5
    # 224 / 14 = 16 patches a side, 8 tokens.
    assert internvl.image_seq_length == 64
    assert not is_transposed(from_original({**bare({"architectures": ["LlamaForCausalLM"]}), "ps_version": "v2"}, FILE))
    assert not is_transposed(InternVLConfig())


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("InternLM2ForCausalLM", "attention_bias", True),
        ("InternLM2ForCausalLM", "rms_norm_eps", 1e-6),
        ("InternLM2ForCausalLM", "max_position_embeddings", 2048),
        ("InternLM2ForCausalLM", "num_key_value_heads", 6),
        ("InternLM2ForCausalLM", "bos_token_id", 1),
        ("InternLM2ForCausalLM", "eos_token_id", 2),
        ("InternLM2ForCausalLM", "pad_token_id", 0),
        ("LlamaForCausalLM", "attention_bias", False),
        ("LlamaForCausalLM", "rms_norm_eps", 1e-6),
        ("LlamaForCausalLM", "max_position_embeddings", 2048),
        ("LlamaForCausalLM", "bos_token_id", 1),
        ("LlamaForCausalLM", "eos_token_id", 2),
        ("Qwen2ForCausalLM", "max_position_embeddings", 32768),
        ("Qwen2ForCausalLM", "rms_norm_eps", 1e-6),
        ("Qwen2ForCausalLM", "use_sliding_window", False),
        ("Phi3ForCausalLM", "rms_norm_eps", 1e-5),
        ("Phi3ForCausalLM", "max_position_embeddings", 4096),
        ("Phi3ForCausalLM", "num_key_value_heads", 6),
    ],
)
def test_defaults_of_the_language_models(kind, field, value):
    """Classes of transformers 4.37.2 (Qwen2, Llama) and of the original (InternLM2, Phi-3)."""
    # Ids of the class's own special tokens lie in a real vocabulary.
    text = text_config(from_original(bare({"architectures": [kind], "vocab_size": 40000}), FILE))
    assert getattr(text, field) == value
    assert text.rope_parameters["rope_theta"] == 10000.0
    assert text.rope_parameters["rope_type"] == "default"
    assert text.hidden_act == "silu"


def test_force_image_size_decides_the_tile():
    config = originals.family_config("qwen2_300m", force_image_size=112)
    assert tile_size(from_original(config, FILE)) == 112
    del config["force_image_size"]
    assert tile_size(from_original(config, FILE)) == 56


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v3"}, "ps_version='v3' is not one of v1, v2"),
        ({"vision_config": None}, "has no vision_config"),
        ({"llm_config": None}, "has no llm_config"),
        ({"downsample_ratio": "half"}, "downsample_ratio"),
        ({"select_layer": "last"}, "vision_feature_layer"),
        ({"vision_config.norm_type": "group_norm"}, "norm_type='group_norm' is not one of layer_norm, rms_norm"),
        ({"vision_config.hidden_size": "wide"}, "hidden_size"),
        (
            {"llm_config.architectures": ["Gemma2ForCausalLM"]},
            "'Gemma2ForCausalLM'; supported are InternLM2ForCausalLM",
        ),
        ({"llm_config.architectures": []}, "architectures names None"),
        ({"llm_config.architectures": 7}, "architectures"),
        ({"llm_config.vocab_size": "<gone>"}, "does not give vocab_size"),
        ({"llm_config.vocab_size": "many"}, "vocab_size"),
        ({"llm_config.rope_scaling": "dynamic"}, "rope_scaling"),
        ({"llm_config.rope_theta": "large"}, "rope_theta"),
        ({"vision_config.patch_size": 0}, "patch_size"),
    ],
)
def test_wrong_fields_are_named_with_the_file(change, message):
    """Whatever the library's own error would be."""
    config = originals.family_config("qwen2_300m")
    for path, value in change.items():
        section, _, key = path.rpartition(".")
        target = config[section] if section else config
        if value == "<gone>":
            del target[key]
        else:
            target[key] = value
    with pytest.raises(CheckpointError) as caught:
        from_original(config, FILE)
    assert str(FILE) in str(caught.value)
    assert message in str(caught.value)


def test_reading_a_config_does_not_change_it(family):
    before = copy.deepcopy(family)
    internvl = from_original(family, FILE)
    to_original(internvl, template="unused")
    record(internvl)["llm_config"]["vocab_size"] = 0
    assert family == before


def test_phi3_of_its_own_class_has_its_own_limits():
    """A native Phi-3 without scaling is one in the original too."""
    text = Phi3Config(
        **{key: value for key, value in originals.PHI3.items() if "rope" not in key and key != "architectures"}
    )
    internvl = InternVLConfig(text_config=text, tie_word_embeddings=False)
    made = to_original(internvl, template="phi3-chat")["llm_config"]
    assert made["rope_scaling"] is None
    assert made["architectures"] == ["Phi3ForCausalLM"]
