"""The donor of progressive scaling: what is opened as one, what it brings to a network, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLVisionConfig

from ivl_lightning.checkpoints.lineage import Lineage, write_lineage
from ivl_lightning.checkpoints.run_folders import tower_folder
from ivl_lightning.checkpoints.source import TensorSource
from ivl_lightning.constants import SPECIAL_TOKENS
from ivl_lightning.models.assembly import JOINT, TOWER
from ivl_lightning.models.build import load_model
from ivl_lightning.models.checkpoint import read_config
from ivl_lightning.models.donor import DonorError, brought_parts, check_special_tokens, open_donor
from ivl_lightning.models.tokenizer import load_tokenizer
from tests import originals, tiny

QWEN2, INTERNLM2 = (originals.CHECKPOINTS / name for name in originals.GOLDEN)
QUERY = f"{TOWER}encoder.layer.0.attention.q_proj.weight"


def tensors_of(folder: Path, *prefixes: str) -> dict[str, Tensor]:
    """Tensors of the network that a folder holds, by native names."""
    found = load_model(folder).named_parameters()
    return {name: value.detach() for name, value in found if name.startswith(prefixes)}


def read_all(source: TensorSource) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.names()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert found, "nothing to compare"
    return found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


# -- folders ----------------------------------------------------------------------------------------------------------


def original(folder: Path) -> Path:
    return originals.copy_golden("qwen2_vit300m", folder)


def native(folder: Path) -> Path:
    """As transformers saves it, with its tokenizer."""
    load_model(QWEN2).save_pretrained(folder)
    load_tokenizer(QWEN2).save_pretrained(folder)
    return folder


def bare(folder: Path, prefix: str = "") -> Path:
    """An InternViT of its own: names as released, or with the prefix of a whole."""
    golden = originals.golden("qwen2_vit300m")
    tensors = {
        prefix + name.removeprefix("vision_model."): value.clone()
        for name, value in golden.tensors.items()
        if name.startswith("vision_model.")
    }
    return originals.write_folder(folder, golden.config["vision_config"], tensors, None)


def bare_native(folder: Path) -> Path:
    load_model(QWEN2).model.vision_tower.save_pretrained(folder)
    return folder


def finished(run: Path, name: str, weights: Path, *, at: int, done: bool = True) -> Path:
    """A stage of a run that has left these weights, and the time at which it finished."""
    shutil.copytree(weights, run / name / "weights")
    if done:
        (run / name / "done.json").write_text("{}")
        os.utime(run / name / "done.json", (at, at))
    return run / name


def run_of_stages(folder: Path) -> Path:
    """Stage 1.5 left the tower, stage 2 tuned it further and finished later."""
    finished(folder, "vit_incremental", QWEN2, at=1000)
    finished(folder, "instruction_tuning", INTERNLM2, at=2000)
    return folder


def stage(folder: Path) -> Path:
    return finished(folder, "instruction_tuning", QWEN2, at=1000)


def weights(folder: Path) -> Path:
    return stage(folder) / "weights"


def renamed_native(folder: Path) -> Path:
    """An exported folder: transformers' layout and a record of what made it."""
    native(folder)
    (folder / "parity.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kind", [original, native, renamed_native, run_of_stages, stage, weights])
def test_a_whole_network_gives_tower_and_projector(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    """Whatever folder stands for the golden checkpoint, its tensors come bit for bit; of a run those of stage 1.5."""
    donor = open_donor(str(kind(tmp_path / "donor")))
    brought = donor.brought_to(read_config(INTERNLM2), "match")
    assert same(read_all(brought), tensors_of(QWEN2, TOWER, JOINT))
    assert brought_parts(brought) == ["vision", "projector"]


@pytest.mark.parametrize("kind", [bare, lambda folder: bare(folder, "vision_model."), bare_native])
def test_a_bare_tower_gives_itself(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    """Released names, those of a whole, and transformers'; a projector it has not."""
    brought = open_donor(str(kind(tmp_path / "donor"))).brought_to(read_config(INTERNLM2), "match")
    assert same(read_all(brought), tensors_of(QWEN2, TOWER))
    assert brought_parts(brought) == ["vision"]


def adapter(folder: Path) -> Path:
    """Rank 1 on the first layer's queries, alpha 3: A is 1 in column 5, B is 2 in row 7."""
    a, b = torch.zeros(1, 64), torch.zeros(64, 1)
    a[0, 5], b[7, 0] = 1.0, 2.0
    module = f"base_model.model.{QUERY.removesuffix('.weight')}"
    folder.mkdir()
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "base_model_name_or_path": str(QWEN2)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_an_adapter_gives_the_tower_it_is_merged_into(tmp_path: Path) -> None:
    """W + 3 / 1 * B A: 6 is added at row 7, column 5, and nothing anywhere else."""
    found = read_all(open_donor(str(adapter(tmp_path / "adapter"))).brought_to(read_config(QWEN2), "match"))
    wanted = {name: value.clone() for name, value in tensors_of(QWEN2, TOWER, JOINT).items()}
    wanted[QUERY][7, 5] += 6.0
    assert same(found, wanted)


def test_stage_1_5_counts_once_it_is_finished(tmp_path: Path) -> None:
    """Begun alone it does not: then the stage that finished last gives the tower, whatever its name."""
    run = tmp_path / "run"
    finished(run, "vit_incremental", QWEN2, at=3000, done=False)
    finished(run, "mlp_warmup", QWEN2, at=1000)
    last = finished(run, "instruction_tuning", INTERNLM2, at=2000)
    assert tower_folder(str(run)) == last / "weights"
    (run / "vit_incremental/done.json").write_text("{}")
    os.utime(run / "vit_incremental/done.json", (1, 1))
    assert tower_folder(str(run)) == run / "vit_incremental/weights"
    assert open_donor(str(run)).folder == run / "vit_incremental/weights"


# -- towers that do not fit -------------------------------------------------------------------------------------------

FIELDS = [
    ("image_size", [28, 28], "its tile size in pixels is 56, here it is 28 (image_size)"),
    ("patch_size", [28, 28], "its patch size in pixels is 14, here it is 28 (patch_size)"),
    ("num_channels", 1, "its number of color channels is 3, here it is 1 (num_channels)"),
    ("hidden_size", 32, "its width is 64, here it is 32 (hidden_size)"),
    ("num_hidden_layers", 2, "its number of layers is 3, here it is 2 (num_hidden_layers)"),
    ("num_attention_heads", 8, "its number of heads is 4, here it is 8 (num_attention_heads)"),
    ("intermediate_size", 48, "its width of the MLP is 96, here it is 48 (intermediate_size)"),
    ("norm_type", "rms_norm", "its kind of norm is layer_norm, here it is rms_norm (norm_type)"),
    ("layer_norm_eps", 1e-5, "its epsilon of norms is 1e-06, here it is 1e-05 (layer_norm_eps)"),
    ("use_qk_norm", True, "its norm of queries and keys is False, here it is True (use_qk_norm)"),
    ("attention_bias", False, "its bias of queries, keys and values is True, here it is False (attention_bias)"),
    ("hidden_act", "relu", "its activation is gelu, here it is relu (hidden_act)"),
    (
        "use_absolute_position_embeddings",
        False,
        "its position embeddings is True, here it is False (use_absolute_position_embeddings)",
    ),
    ("use_mask_token", True, "its mask token is False, here it is True (use_mask_token)"),
    ("use_mean_pooling", False, "its mean pooling is True, here it is False (use_mean_pooling)"),
]
HARMLESS = {
    "hidden_dropout_prob": 0.5,
    "attention_dropout": 0.5,
    "projection_dropout": 0.5,
    "initializer_range": 0.5,
    "layer_scale_init_value": 0.5,
}
"""What a tower starts from, or drops in training: a trained one may take its place all the same."""


def network(**vision: Any) -> InternVLConfig:
    """The configuration of a network with the golden tower, but for some fields."""
    config = read_config(INTERNLM2)
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    return config


@pytest.mark.parametrize(("field", "value", "message"), FIELDS)
def test_a_tower_of_another_kind_is_refused_with_both_values(field: str, value: Any, message: str) -> None:
    with pytest.raises(DonorError) as caught:
        open_donor(str(QWEN2)).brought_to(network(**{field: value}), "match")
    assert str(caught.value).startswith(f"scaling.donor={QWEN2}: its vision tower does not fit this network: {message}")


def test_every_difference_is_named_at_once() -> None:
    config = network(hidden_size=32, num_hidden_layers=2)
    config.vision_feature_layer = -2
    with pytest.raises(DonorError) as caught:
        open_donor(str(QWEN2)).brought_to(config, "new")
    assert "its width is 64, here it is 32" in str(caught.value)
    assert "its number of layers is 3, here it is 2" in str(caught.value)
    assert "the layer whose features are used is -1 there and -2 here" in str(caught.value)


def test_a_bare_tower_does_not_say_which_layer_is_used(tmp_path: Path) -> None:
    config = network()
    config.vision_feature_layer = -2
    assert open_donor(str(bare(tmp_path / "vit"))).brought_to(config, "match").names()


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_are_counted_from_either_end(layer: int) -> None:
    """The third of three is the last."""
    config = network()
    config.vision_feature_layer = layer
    assert open_donor(str(QWEN2)).brought_to(config, "match").names()


def test_every_field_of_a_tower_is_compared_or_does_no_harm() -> None:
    """A field that transformers adds must go to one side or the other."""
    known = {field for field, _, _ in FIELDS} | HARMLESS.keys()
    own = {name for name in InternVLVisionConfig.__annotations__ if name not in ("model_type", "base_config_key")}
    assert own == known
    brought = open_donor(str(QWEN2)).brought_to(network(**HARMLESS), "match")
    assert same(read_all(brought), tensors_of(QWEN2, TOWER, JOINT))


def test_opening_and_comparing_draws_no_random_number_and_changes_no_configuration() -> None:
    config = network()
    values, state = copy.deepcopy(config.to_dict()), torch.get_rng_state()
    attention = config.vision_config._attn_implementation
    open_donor(str(QWEN2)).brought_to(config, "match")
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == values
    assert config.vision_config._attn_implementation == attention


# -- the projector ----------------------------------------------------------------------------------------------------


def parts(config: InternVLConfig, source: Path = QWEN2, projector: Any = "match") -> list[str]:
    return list(brought_parts(open_donor(str(source)).brought_to(config, projector)))


def test_the_projector_comes_where_the_language_models_are_equally_wide() -> None:
    """48 and 48 is, 48 and 60 is not; `new` leaves it in any case."""
    assert parts(network()) == ["vision", "projector"]
    assert parts(network(), projector="new") == ["vision"]
    wider = network()
    wider.text_config.hidden_size = 60
    assert parts(wider) == ["vision"]


def test_a_projector_of_another_activation_stays() -> None:
    config = network()
    config.projector_hidden_act = "relu"
    assert parts(config) == ["vision"]


def test_a_projector_stays_where_tokens_run_in_another_order(tmp_path: Path) -> None:
    """One of `ps_version` v1 was trained on a tile's tokens column by column."""
    columns = originals.copy_golden("qwen2_vit300m", tmp_path / "v1", ps_version="v1")
    assert parts(read_config(INTERNLM2), columns) == ["vision"]
    assert parts(read_config(columns), QWEN2) == ["vision"]
    assert parts(read_config(columns), columns) == ["vision", "projector"]


# -- damaged donors ---------------------------------------------------------------------------------------------------


def without(folder: Path, *names: str) -> Path:
    """The golden checkpoint without some of its tensors."""
    original(folder)
    tensors = {name: value for name, value in load_file(QWEN2 / "model.safetensors").items() if name not in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["vision_model.encoder.layers.2.ls1", "mlp1.3.bias"])
def test_what_a_donor_lacks_does_not_stay_the_network_s_own(name: str, tmp_path: Path) -> None:
    """Two towers in one, or a projector that is new without a word, would be the worse for it."""
    donor = open_donor(str(without(tmp_path / "donor", name)))
    native_name = f"{TOWER}encoder.layer.2.lambda_1" if name.endswith("ls1") else f"{JOINT}linear_2.bias"
    with pytest.raises(DonorError, match=f"that the checkpoint does not hold: {native_name}. Fetch") as caught:
        donor.brought_to(read_config(INTERNLM2), "match")
    assert str(caught.value).startswith(f"scaling.donor={tmp_path}/donor: ")


def test_a_tensor_of_another_shape_than_its_configuration_says(tmp_path: Path) -> None:
    """A vector of 1 would be spread over 64 channels if it were copied as it is."""
    folder = original(tmp_path / "donor")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.encoder.layers.2.ls1"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DonorError, match=r"lambda_1 has the shape \(1,\), but .*config.json makes it \(64,\)"):
        open_donor(str(folder)).brought_to(read_config(INTERNLM2), "match")


def nowhere(folder: Path) -> Path:
    return folder


def a_file(folder: Path) -> Path:
    folder.write_text("")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def no_weights(folder: Path) -> Path:
    (original(folder) / "model.safetensors").unlink()
    return folder


def unfinished(folder: Path) -> Path:
    finished(folder, "vit_incremental", QWEN2, at=1, done=False)
    return folder


def language(folder: Path) -> Path:
    golden = originals.golden("qwen2_vit300m")
    return originals.write_folder(folder, golden.config["llm_config"], {"model.norm.weight": torch.ones(48)}, None)


def cut_short(folder: Path) -> Path:
    file = original(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def lost_shard(folder: Path) -> Path:
    (original(folder) / "model.safetensors").unlink()
    index = {"weight_map": {"mlp1.0.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def pointer(folder: Path) -> Path:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n"
    (original(folder) / "model.safetensors").write_text(text)
    return folder


def torch_pointer(folder: Path) -> Path:
    (pointer(folder) / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def no_json(folder: Path) -> Path:
    (original(folder) / "config.json").write_text('{"model_type": ')
    return folder


def no_object(folder: Path) -> Path:
    (original(folder) / "config.json").write_text("[]")
    return folder


def wrong_field(folder: Path) -> Path:
    return originals.copy_golden("qwen2_vit300m", folder, vision_config={"hidden_size": "wide"})


def no_tokenizer_json(folder: Path) -> Path:
    (original(folder) / "vocab.json").write_text("{")
    return folder


def lost_tokens(folder: Path) -> Path:
    """A network in transformers' layout with the tokenizer of the bare language model."""
    load_model(QWEN2).save_pretrained(folder)
    bare_tokenizer(folder)
    return folder


def bare_tokenizer(folder: Path) -> None:
    """The golden tokenizer without InternVL's nine tokens."""
    shutil.copy(QWEN2 / "vocab.json", folder)
    shutil.copy(QWEN2 / "merges.txt", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nowhere, "there is no such folder"),
        (a_file, "this is a file: give its folder"),
        (empty, "neither a folder of weights nor a run with a finished stage"),
        (unfinished, "neither a folder of weights nor a run with a finished stage"),
        (no_weights, "{} holds no weights: looked for model.safetensors"),
        (language, "{}/config.json: model_type is 'qwen2', which is no vision tower"),
        (cut_short, "{}/model.safetensors is damaged or cut short"),
        (
            lost_shard,
            "{}/model.safetensors.index.json names files that are not there: model-00001-of-00002.safetensors",
        ),
        (pointer, "{}/model.safetensors is damaged or cut short"),
        (torch_pointer, "{}/pytorch_model.bin is damaged or cut short (a pointer of git lfs, not the file)"),
        (no_json, "{}/config.json is not valid JSON"),
        (no_object, "{}/config.json does not hold a JSON object"),
        (wrong_field, "{}/config.json: hidden_size='wide' must be a whole number above 0"),
        (no_tokenizer_json, "{}: the tokenizer's files are damaged"),
        (lost_tokens, f"the tokenizer beside its weights lacks the special tokens {', '.join(SPECIAL_TOKENS)}"),
    ],
)
def test_what_cannot_be_opened_names_the_setting_and_the_fault(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "donor")
    with pytest.raises(ValueError, match=r"scaling\.donor=") as caught:
        open_donor(str(path))
    assert str(caught.value).startswith(f"scaling.donor={path}: {message.format(path)}")


# -- special tokens ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_must_know_all_nine_tokens() -> None:
    check_special_tokens(tiny.load_tiny_tokenizer(), "this one")


def test_those_it_lacks_are_listed(tmp_path: Path) -> None:
    """Six of nine, in the official order."""
    bare_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens(["</img>", "<quad>", "<box>"], special_tokens=True)
    with pytest.raises(DonorError) as caught:
        check_special_tokens(tokenizer, "the tokenizer of this run")
    assert str(caught.value).startswith(
        "the tokenizer of this run lacks the special tokens <img>, <IMG_CONTEXT>, </quad>, <ref>, </ref>, </box> of"
    )


def test_a_tower_that_no_stage_has_trained(tmp_path: Path) -> None:
    """Its lineage says that it began with random numbers and that the language model alone has trained since."""
    donor = bare(tmp_path / "donor")
    lineage = Lineage("language_warmup", str(donor), ["llm"], 3, 100, {}, [])
    write_lineage(lineage, donor)
    with pytest.raises(DonorError, match="no stage of its lineage has trained its vision tower"):
        open_donor(str(donor))
    write_lineage(replace(lineage, trained=["vision", "projector"]), donor)
    open_donor(str(donor))
