"""A model from parts of different origin, and one some of whose parts are replaced."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
)

from ivl_lightning.checkpoints.source import CheckpointError, MemorySource
from ivl_lightning.cli.convert import convert
from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.conversion.native_forward import forward
from ivl_lightning.conversion.write import write_checkpoint
from ivl_lightning.models.assembly import JOINT, LANGUAGE, TOWER, Sources, open_sources
from ivl_lightning.models.build import load_model
from ivl_lightning.models.checkpoint import Checkpoint, open_checkpoint
from ivl_lightning.models.loader import build_model
from ivl_lightning.models.original_config import is_transposed, record
from ivl_lightning.models.parts import text_config, tile_size
from ivl_lightning.models.positions import POSITIONS, ResizedPositions, resize_positions
from ivl_lightning.models.tokenizer import image_token_id, load_tokenizer
from tests import originals, tiny
from tests.originals import difference

QWEN2, INTERNLM2 = (originals.CHECKPOINTS / name for name in originals.GOLDEN)
SIZES = {
    key: value for key, value in originals.LLAMA.items() if key not in ("architectures", "model_type", "rope_theta")
}


def write_part(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A folder with one part in it."""
    return originals.write_folder(folder, config, tensors, None)


def part_of(golden: originals.Golden, prefix: str) -> dict[str, Tensor]:
    """Tensors of one part, without the prefix they have in a whole checkpoint."""
    return {
        name.removeprefix(prefix): value.clone() for name, value in golden.tensors.items() if name.startswith(prefix)
    }


def bare_tower(folder: Path, name: str = "internlm2_vit300m") -> Path:
    """An InternViT as it is released: names without a prefix, `model_type` of the 6B whatever its size."""
    golden = originals.golden(name)
    return write_part(folder, golden.config["vision_config"], part_of(golden, "vision_model."))


def bare_language(folder: Path, name: str = "internlm2_vit300m") -> Path:
    """A language model of its own; Qwen2's names are transformers', InternLM2's are not."""
    golden = originals.golden(name)
    return write_part(folder, golden.config["llm_config"], part_of(golden, "language_model."))


def bare_projector(file: Path, name: str = "internlm2_vit300m", prefix: str = "") -> Path:
    """`mlp1` as it is released: a torch file of `0.weight` and so on."""
    tensors = {f"{prefix}{key}": value for key, value in part_of(originals.golden(name), "mlp1.").items()}
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return file


def weights(model: PreTrainedModel, *prefixes: str) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if name.startswith(prefixes or "")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def outputs(model: InternVLForConditionalGeneration, golden: originals.Golden) -> Tensor:
    model.config.image_token_id = model.model.config.image_token_id = golden.image_token_id
    with torch.no_grad():
        return forward(model, golden.inputs["input_ids"][0], golden.inputs["pixel_values"]).logits


# -- all parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix", "suffix"),
    [
        ("qwen2_vit300m", "", ".pth"),
        ("qwen2_vit300m", "mlp1.", ".bin"),
        ("internlm2_vit300m", "mlp1.", ".pth"),
        ("internlm2_vit300m", "", ".safetensors"),
    ],
)
def test_released_parts_make_the_whole(name, prefix, suffix, tmp_path: Path):
    """The parts of a golden checkpoint, each by itself, give what the whole one gave."""
    golden = originals.golden(name)
    model = load_model(
        vision=bare_tower(tmp_path / "vit", name),
        projector=bare_projector(tmp_path / f"mlp1{suffix}", name, prefix),
        language_model=bare_language(tmp_path / "llm", name),
        attention="sdpa",
    )
    assert same(weights(model), weights(load_model(golden.folder)))
    assert difference(outputs(model, golden), golden.reference["logits"][0]) <= 1e-5


def test_a_tower_whose_names_have_the_prefix_of_a_whole(tmp_path: Path):
    golden = originals.golden("qwen2_vit300m")
    tensors = {name: value for name, value in golden.tensors.items() if name.startswith("vision_model.")}
    tower = write_part(tmp_path / "vit", golden.config["vision_config"], tensors)
    assert same(weights(load_model(INTERNLM2, vision=tower), TOWER), weights(load_model(QWEN2), TOWER))


def test_a_tower_that_the_library_saved(tmp_path: Path):
    whole = load_model(QWEN2)
    whole.model.vision_tower.save_pretrained(tmp_path / "vit")
    model = load_model(vision=tmp_path / "vit", language_model=INTERNLM2)
    assert same(weights(model, TOWER), weights(whole, TOWER))
    assert tile_size(model.config) == 56
    assert model.config.vision_config.norm_type == "layer_norm"


def test_a_tower_in_the_style_of_the_6b_that_the_library_saved(tmp_path: Path):
    """Query and key norms and all; `InternVLVisionModel` of its own."""
    torch.manual_seed(0)
    fields = {**originals.VIT_6B, "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
    tower = InternVLVisionModel(InternVLVisionConfig(**fields, use_mean_pooling=True))
    tower.save_pretrained(tmp_path / "vit")
    model = load_model(vision=tmp_path / "vit", language_model=QWEN2)
    own = {TOWER + name: value for name, value in tower.named_parameters()}
    assert any("q_norm" in name for name in own)
    assert same(weights(model, TOWER), own)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """The golden Qwen2 checkpoint in transformers' layout."""
    folder = tmp_path_factory.mktemp("hf") / "qwen2"
    convert(originals.settings(QWEN2, folder, logits=False))
    return folder


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_parts_of_whole_checkpoints(layout, hf, tmp_path: Path):
    """A folder of either layout stands for its tower, its projector or its language model."""
    source = hf if layout == "hf" else QWEN2
    whole, other = load_model(source), load_model(INTERNLM2)
    model = load_model(vision=source, projector=source, language_model=INTERNLM2)
    assert same(weights(model, TOWER, JOINT), weights(whole, TOWER, JOINT))
    assert same(weights(model, *LANGUAGE), weights(other, *LANGUAGE))
    model = load_model(vision=INTERNLM2, projector=INTERNLM2, language_model=source)
    assert same(weights(model, *LANGUAGE), weights(whole, *LANGUAGE))


def random_causal(kind: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **fields}), dtype=torch.float32)


@pytest.mark.parametrize("version", ["v1", "v2", None])
def test_the_order_of_a_tile_s_tokens_of_new_parts(version, tmp_path: Path):
    """A bare tower and a bare language model have no order yet; v2 where nobody says."""
    checkpoint = open_sources(
        Sources(vision=bare_tower(tmp_path / "vit"), language_model=bare_language(tmp_path / "llm"), ps_version=version)
    )
    assert is_transposed(checkpoint.config) is (version == "v1")
    assert record(checkpoint.config)["ps_version"] == (version or "v2")


def test_an_order_that_the_weights_do_not_have(hf, tmp_path: Path):
    """Projectors are trained with one order. Transformers' layout knows v2 alone; so do other models."""
    for source in (hf, QWEN2):
        with pytest.raises(ValueError, match=r"ps_version=v1 was asked for, but .* are in the order v2"):
            open_sources(Sources(path=source, ps_version="v1"))
        open_sources(Sources(path=source, ps_version="v2"))
    random_causal("gemma", head_dim=8, pad_token_id=0).save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"ps_version=v1: .* has no class for a language model of type gemma"):
        open_sources(Sources(vision=bare_tower(tmp_path / "vit"), language_model=tmp_path / "llm", ps_version="v1"))


@pytest.mark.parametrize(
    ("version", "projector"), [("v1", "TransposedProjector"), (None, "InternVLMultiModalProjector")]
)
def test_random_weights_in_an_order(version, projector):
    model = build_model(tiny.tiny_config(ps_version=version), tiny.load_tiny_tokenizer())
    assert type(model.model.multi_modal_projector).__name__ == projector


def test_the_layer_whose_features_are_used(tmp_path: Path):
    """Of new parts it can be chosen, by default the last. A whole checkpoint has its own: -1 of 3, which is layer 3."""
    parts = {"vision": bare_tower(tmp_path / "vit"), "language_model": bare_language(tmp_path / "llm")}
    assert open_sources(Sources(**parts)).config.vision_feature_layer == -1
    assert open_sources(Sources(**parts, vision_feature_layer=-2)).config.vision_feature_layer == -2
    assert open_sources(Sources(path=QWEN2, vision_feature_layer=3)).config.vision_feature_layer == -1
    with pytest.raises(
        ValueError, match=r"vision_feature_layer=-2 was asked for, but .* takes the features of layer -1"
    ):
        open_sources(Sources(path=QWEN2, vision_feature_layer=-2))
    with pytest.raises(ValueError, match=r"select_layer=-9, but the vision tower has 3 layers"):
        open_sources(Sources(**parts, vision_feature_layer=-9))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "phi3", "qwen3", "gemma"])
def test_any_language_model_that_the_library_saved(kind, tied, tmp_path: Path):
    """One whose head is its embeddings gets a head of its own with the same numbers; so it computes what it did."""
    extra = {"head_dim": 8} if kind in ("qwen3", "gemma") else {}
    causal = random_causal(kind, tie_word_embeddings=tied, pad_token_id=0, **extra).eval()
    causal.save_pretrained(tmp_path / "llm")
    stored = load_file(tmp_path / "llm/model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    model = load_model(vision=QWEN2, language_model=tmp_path / "llm", attention="sdpa")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, causal.lm_head.weight)
    ids = torch.arange(30)
    with torch.no_grad():
        assert difference(model(input_ids=ids[None]).logits, causal(input_ids=ids[None]).logits) <= 1e-5
    assert not model.config.tie_word_embeddings
    assert not text_config(model.config).tie_word_embeddings


def test_a_bare_llama_of_an_old_release(tmp_path: Path):
    """Until 2023 the rotary frequencies were stored, as in Vicuna: they follow from the configuration."""
    causal = random_causal("llama")
    causal.save_pretrained(tmp_path / "llm")
    file = tmp_path / "llm/model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, file, metadata={"format": "pt"})
    model = load_model(vision=QWEN2, language_model=tmp_path / "llm")
    assert torch.equal(model.lm_head.weight, causal.lm_head.weight)


def test_an_internlm2_of_its_own_with_biases(tmp_path: Path):
    """The class's default, which no release uses; names and rows as in a whole checkpoint."""
    config = {**originals.INTERNLM2}
    del config["bias"]
    tensors = originals.random_tensors(originals.language_shapes(config))
    model = load_model(vision=QWEN2, language_model=write_part(tmp_path / "llm", config, tensors))
    wqkv = tensors["model.layers.1.attention.wqkv.bias"].unflatten(0, (2, 5, 8))
    attention = model.model.language_model.layers[1].self_attn
    assert torch.equal(attention.q_proj.bias, wqkv[:, :3].flatten())
    assert torch.equal(attention.k_proj.bias, wqkv[:, 3].flatten())
    assert torch.equal(attention.v_proj.bias, wqkv[:, 4].flatten())


# -- a base some of whose parts are replaced ----------------------------------------------------------------------


def test_a_replaced_tower_and_a_projector_that_fits(tmp_path: Path):
    """Both golden towers are 64 wide, so the base's projector stays; its language model does."""
    base = load_model(QWEN2)
    model = load_model(QWEN2, vision=bare_tower(tmp_path / "vit"))
    assert same(weights(model, JOINT, *LANGUAGE), weights(base, JOINT, *LANGUAGE))
    assert same(weights(model, TOWER), weights(load_model(INTERNLM2), TOWER))


def test_a_replaced_language_model_and_a_projector_that_fits(tmp_path: Path):
    model = load_model(QWEN2, language_model=bare_language(tmp_path / "llm"))
    assert same(weights(model, TOWER, JOINT), weights(load_model(QWEN2), TOWER, JOINT))
    assert same(weights(model, *LANGUAGE), weights(load_model(INTERNLM2), *LANGUAGE))


def test_a_replaced_projector(tmp_path: Path):
    model = load_model(QWEN2, projector=bare_projector(tmp_path / "mlp1.pth"))
    assert same(weights(model, JOINT), weights(load_model(INTERNLM2), JOINT))
    assert same(weights(model, TOWER, *LANGUAGE), weights(load_model(QWEN2), TOWER, *LANGUAGE))


def check_new_projector(model: InternVLForConditionalGeneration) -> None:
    """torch's own start: norm 1 and 0, uniform up to 1 / sqrt(inputs)."""
    projector = model.model.multi_modal_projector
    assert torch.equal(projector.layer_norm.weight, torch.ones_like(projector.layer_norm.weight))
    assert torch.equal(projector.layer_norm.bias, torch.zeros_like(projector.layer_norm.bias))
    for layer in (projector.linear_1, projector.linear_2):
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.8 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


@pytest.mark.parametrize("part", ["vision", "language_model"])
def test_a_projector_that_does_not_fit_is_new(part, tmp_path: Path):
    """A tower of 24 channels for 64, or a language model of width 60 for 48."""
    if part == "vision":
        config = originals.family_config("llama_6b")["vision_config"]
        folder = write_part(tmp_path / "vit", config, strip(originals.random_tensors(originals.vision_shapes(config))))
    else:
        random_causal("llama", hidden_size=60).save_pretrained(tmp_path / "llm")
        folder = tmp_path / "llm"
    torch.manual_seed(1)
    model = load_model(QWEN2, **{part: folder})
    check_new_projector(model)
    torch.manual_seed(1)
    again = load_model(QWEN2, **{part: folder})
    assert same(weights(model), weights(again))


def strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("vision_model."): value for name, value in tensors.items()}


def test_a_projector_that_is_given_nowhere_is_new(tmp_path: Path):
    """`vision` takes the tower of a whole checkpoint and nothing else of it."""
    check_new_projector(load_model(vision=QWEN2, language_model=QWEN2))


def of_another_language(folder: Path, **settings: Any) -> Checkpoint:
    """A base with these settings whose language model is replaced."""
    base = originals.copy_golden("qwen2_vit300m", folder, **settings)
    return open_sources(Sources(path=base, language_model=INTERNLM2))


def test_template_and_pixel_shuffle_of_the_base_stay(tmp_path: Path):
    """Its language model is another now; what its projector and data were trained with is not."""
    config = of_another_language(tmp_path / "base", template="Hermes-2", ps_version="v1").config
    assert is_transposed(config)
    assert record(config)["template"] == "Hermes-2"
    assert record(config)["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]


def test_how_the_base_cuts_pictures_stays(tmp_path: Path):
    """As far as a language model can tell, pictures are what they were."""
    settings = {"max_dynamic_patch": 5, "use_thumbnail": False, "min_dynamic_patch": 2, "pad2square": True}
    found = record(of_another_language(tmp_path / "base", **settings).config)
    assert {key: found[key] for key in settings} == settings


def test_the_base_keeps_its_tokenizer_with_its_language_model(tmp_path: Path):
    """A tower or projector has none, so nothing speaks against the one that belongs to the language model."""
    checkpoint = open_sources(Sources(path=QWEN2, vision=bare_tower(tmp_path / "vit")))
    assert checkpoint.tokenizer is not None
    assert checkpoint.config.image_token_id == originals.golden("qwen2_vit300m").image_token_id


def test_another_language_model_brings_its_own_tokenizer():
    """The base's gives ids of other words: its 411 would all have a row among the 450, and nothing would complain."""
    checkpoint = open_sources(Sources(path=INTERNLM2, language_model=QWEN2))
    assert checkpoint.tokenizer is None or len(checkpoint.tokenizer()) == 445
    assert checkpoint.config.image_token_id != originals.golden("internlm2_vit300m").image_token_id


# -- positions for tiles of another size --------------------------------------------------------------------------


def by_hand(positions: Tensor, old: int, new: int) -> Tensor:
    """The official rule: class token apart; patches as a picture of C channels; bicubic, corners not aligned."""
    picture = positions[0, 1:].float().reshape(old, old, -1).permute(2, 0, 1)[None]
    resized = F.interpolate(picture, size=(new, new), mode="bicubic", align_corners=False)
    patches = resized[0].permute(1, 2, 0).reshape(1, new * new, -1).to(positions.dtype)
    return torch.cat([positions[:, :1], patches], dim=1)


@pytest.mark.parametrize(
    ("origin", "size"), [("whole", 28), ("whole", 56), ("whole", 84), ("whole", 112), ("parts", 112)]
)
def test_positions_of_another_tile(origin, size, tmp_path: Path):
    """From 4 by 4 patches to 2, 4, 6 or 8 a side; all else stays; the config and its record say the new size."""
    vision = None if origin == "whole" else bare_tower(tmp_path / "vit", "qwen2_vit300m")
    golden = originals.golden("qwen2_vit300m")
    model = load_model(QWEN2, vision=vision, image_size=size)
    old = golden.tensors["vision_model.embeddings.position_embedding"]
    found = dict(model.named_parameters())[POSITIONS]
    side = size // 14
    assert torch.equal(found, old if size == 56 else by_hand(old, 4, side))
    assert torch.equal(found[:, 0], old[:, 0])
    assert tile_size(model.config) == size
    assert model.config.image_seq_length == (side // 2) ** 2
    others = weights(load_model(QWEN2))
    assert all(torch.equal(value, others[name]) for name, value in weights(model).items() if name != POSITIONS)


def test_a_resized_tower_computes_what_the_original_does(tmp_path: Path):
    """The original resizes at every pass where a tile is not of the trained size; written, it is trained size now."""
    checkpoint = open_sources(Sources(path=QWEN2, image_size=112))
    report = write_checkpoint(checkpoint, originals.settings(QWEN2, tmp_path / "target", layout="original"))
    assert not report.faults
    assert report.logits[0].image_features is not None
    config = originals.read_config(tmp_path / "target")
    assert config["force_image_size"] == config["vision_config"]["image_size"] == 112
    tensors = load_file(tmp_path / "target/model.safetensors")
    assert tensors["vision_model.embeddings.position_embedding"].shape == (1, 65, 64)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(min_value=1, max_value=6),
    st.integers(min_value=1, max_value=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_resizing_keeps_constants_type_and_class_token(old, new, dtype):
    """Interpolation weights sum to 1 up to rounding, so a constant stays; at the same size everything does."""
    positions = torch.full((1, 1 + old * old, 3), 2.5, dtype=dtype)
    positions[:, 0] = 7.0
    resized = resize_positions(positions, new)
    assert resized.dtype == dtype
    assert resized.shape == (1, 1 + new * new, 3)
    assert torch.equal(resized[:, :1], positions[:, :1])
    assert difference(resized[:, 1:].float(), torch.tensor(2.5).expand(1, new * new, 3)) <= 1e-5
    random = torch.randn((1, 1 + old * old, 3), generator=torch.Generator().manual_seed(old)).to(dtype)
    assert torch.equal(resize_positions(random, old), random)


def test_resizing_is_done_in_float32():
    """In bfloat16 the sums would be rounded on the way; here once, at the end."""
    positions = torch.randn((1, 17, 4), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(resize_positions(positions, 8), by_hand(positions, 4, 8))


def test_rows_and_columns_are_not_exchanged():
    """Positions that grow along a row, the same in every row, do so afterwards; 3 by 3 is a grid of odd side."""
    row = torch.tensor([0.0, 1.0, 2.0])
    positions = torch.cat([torch.zeros(1), row.repeat(3)]).reshape(1, 10, 1)
    grid = resize_positions(positions, 6)[0, 1:, 0].reshape(6, 6)
    assert difference(grid, grid[:1].expand(6, 6)) <= 1e-6
    assert (grid[0].diff() > 0).all()


def test_only_positions_are_resized_when_they_are_read():
    tensors = {POSITIONS: torch.randn(1, 5, 2), "model.vision_tower.embeddings.cls_token": torch.randn(1, 1, 2)}
    source = ResizedPositions(MemorySource(tensors, "a.bin"), 4)
    assert source.names() == list(tensors)
    assert source.meta(POSITIONS).shape == source.read(POSITIONS).shape == (1, 17, 2)
    assert torch.equal(source.read("model.vision_tower.embeddings.cls_token"), tensors[source.names()[1]])
    assert source.where(POSITIONS) == "a.bin"


def test_a_tile_that_is_no_multiple_of_the_patch():
    with pytest.raises(CheckpointError, match="image_size=60 is no multiple of the vision tower's patch of 14 pixels"):
        load_model(QWEN2, image_size=60)


# -- through build_model ------------------------------------------------------------------------------------------


def small_vocabulary(folder: Path) -> Path:
    """The golden Qwen2's language model without its last rows: 430 for a tokenizer of 445."""
    golden = originals.golden("qwen2_vit300m")
    tensors = part_of(golden, "language_model.")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:430].clone()
    return write_part(folder, {**golden.config["llm_config"], "vocab_size": 430}, tensors)


def test_the_vocabulary_grows_to_the_tokenizers(tmp_path: Path):
    """Old rows stay; new output rows are the mean of the old ones, so that they begin as likely as an average one."""
    language = small_vocabulary(tmp_path / "llm")
    tokenizer = load_tokenizer(QWEN2)
    size = len(tokenizer)
    assert size == 445
    config = ModelConfig(vision_path=str(QWEN2), projector_path=str(QWEN2), language_model_path=str(language))
    model = build_model(config, tokenizer)
    golden = originals.golden("qwen2_vit300m").tensors
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert embeddings.shape[0] == head.shape[0] == text_config(model.config).vocab_size == size
    assert torch.equal(embeddings[:430], golden["language_model.model.embed_tokens.weight"][:430])
    assert torch.equal(head[:430], golden["language_model.lm_head.weight"][:430])
    assert difference(head[430:], head[:430].mean(0).expand(15, -1)) <= 1e-6
    assert model.config.image_token_id == originals.golden("qwen2_vit300m").image_token_id


def test_a_grown_model_is_written_with_its_new_vocabulary(tmp_path: Path):
    """Saved by the library, then converted: the original's config.json says the new number of rows."""
    tokenizer = load_tokenizer(QWEN2)
    config = ModelConfig(vision_path=str(QWEN2), language_model_path=str(small_vocabulary(tmp_path / "llm")))
    build_model(config, tokenizer).save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    report = convert(originals.settings(tmp_path / "grown", tmp_path / "target", layout="original"))
    assert not report.faults
    assert originals.read_config(tmp_path / "target")["llm_config"]["vocab_size"] == 445


def test_a_vocabulary_that_is_large_enough_stays():
    """450 rows for 445 tokens, as in real checkpoints."""
    model = build_model(ModelConfig(path=str(QWEN2)), load_tokenizer(QWEN2))
    assert same(weights(model), weights(load_model(QWEN2)))


# -- written and read back ----------------------------------------------------------------------------------------


def with_tokenizer(checkpoint: Checkpoint, folder: Path = INTERNLM2) -> Checkpoint:
    """Parts have none; it says which id stands for image features."""
    checkpoint.config.image_token_id = image_token_id(load_tokenizer(folder))
    return replace(checkpoint, tokenizer=partial(load_tokenizer, folder))


@pytest.mark.parametrize("language", ["internlm2", "llama"])
def test_an_assembled_model_in_the_originals_layout(language, tmp_path: Path):
    """Proven against the reference code, and read back to the same weights: InternLM2 under its own names."""
    if language == "internlm2":
        folder = bare_language(tmp_path / "llm")
    else:
        random_causal("llama").save_pretrained(tmp_path / "llm")
        folder = tmp_path / "llm"
    torch.manual_seed(2)
    parts = {"vision": bare_tower(tmp_path / "vit"), "language_model": folder, "template": "internlm2-chat"}
    checkpoint = with_tokenizer(open_sources(Sources(**parts)))
    report = write_checkpoint(checkpoint, originals.settings(QWEN2, tmp_path / "target", layout="original"))
    assert not report.faults
    assert [entry.probe for entry in report.logits] == ["image", "text"]
    config = originals.read_config(tmp_path / "target")
    assert config["template"] == "internlm2-chat"
    assert config["ps_version"] == "v2"
    tensors = load_file(tmp_path / "target/model.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == originals.shapes(config)
    torch.manual_seed(2)
    assert same(weights(load_model(tmp_path / "target")), weights(load_model(**parts)))


def test_an_assembled_model_without_a_tokenizer_is_written(tmp_path: Path):
    """No id stands for image features yet: it is chosen with the tokenizer, and the weights can be proven without."""
    parts = {"vision": bare_tower(tmp_path / "vit"), "language_model": bare_language(tmp_path / "llm")}
    report = write_checkpoint(open_sources(Sources(**parts)), originals.settings(QWEN2, tmp_path / "target"))
    assert not report.faults


def test_a_language_model_that_the_original_does_not_know(tmp_path: Path):
    """Only transformers' layout can hold it; the message says so."""
    random_causal("qwen3", head_dim=8).save_pretrained(tmp_path / "llm")
    checkpoint = open_sources(Sources(vision=QWEN2, language_model=tmp_path / "llm"))
    assert not record(checkpoint.config)
    with pytest.raises(CheckpointError, match=r"model_type 'qwen3', for which the original .*use layout=hf"):
        write_checkpoint(checkpoint, originals.settings(QWEN2, tmp_path / "target", layout="original"))
    checkpoint = with_tokenizer(checkpoint, QWEN2)
    assert not write_checkpoint(checkpoint, originals.settings(QWEN2, tmp_path / "target")).faults
    assert same(weights(load_model(tmp_path / "target"), TOWER), weights(load_model(QWEN2), TOWER))


# -- what cannot be put together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"vision": QWEN2}, {"language_model": QWEN2}, {"projector": QWEN2}, {}, {"vision": QWEN2, "projector": QWEN2}],
)
def test_a_part_that_is_missing(given):
    with pytest.raises(CheckpointError, match=r"needs a vision tower and a language model \(model.vision_path and"):
        load_model(**given)


def test_a_projector_alone_is_not_forgotten(tmp_path: Path):
    """Random weights around a trained projector are nobody's wish."""
    config = ModelConfig(
        projector_path=str(bare_projector(tmp_path / "mlp1.pth")), language_model={"model_type": "qwen2"}
    )
    with pytest.raises(CheckpointError, match=r"model.vision_path"):
        build_model(config, load_tokenizer(QWEN2))


def test_a_projector_of_another_width_is_named(tmp_path: Path):
    wide = {
        "0.weight": (96,),
        "0.bias": (96,),
        "1.weight": (48, 96),
        "1.bias": (48,),
        "3.weight": (48, 48),
        "3.bias": (48,),
    }
    torch.save({name: torch.zeros(shape) for name, shape in wide.items()}, tmp_path / "mlp1.pth")
    with pytest.raises(
        CheckpointError, match=r"mlp1.pth: model.multi_modal_projector.layer_norm\.\w+ has the shape \(96,\)"
    ):
        load_model(QWEN2, projector=tmp_path / "mlp1.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, r"layer_norm\.weight"),
        ({"5.weight": torch.zeros(1)}, r"mlp1\.5\.weight"),
        ({"state": {"0.weight": torch.zeros(1)}}, "holds more than tensors: state"),
    ],
)
def test_a_projector_file_that_holds_something_else(change, message, tmp_path: Path):
    """The file and the tensor are named; what it lacks is not taken from the base."""
    tensors: dict[str, Any] = part_of(originals.golden("qwen2_vit300m"), "mlp1.")
    tensors = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    torch.save(tensors, tmp_path / "mlp1.pth")
    for base in ({"path": QWEN2}, {"vision": QWEN2, "language_model": QWEN2}):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(**base, projector=tmp_path / "mlp1.pth")
        assert "mlp1.pth" in str(caught.value)


def test_a_projector_that_is_not_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere.pth: there is no such file"):
        load_model(QWEN2, projector=tmp_path / "nowhere.pth")


def test_no_such_kind_of_tower(tmp_path: Path):
    folder = write_part(tmp_path / "clip", {"model_type": "clip_vision_model"}, {"a": torch.zeros(1)})
    with pytest.raises(
        CheckpointError, match=r"clip/config.json: model_type is 'clip_vision_model', which is no vision"
    ):
        load_model(QWEN2, vision=folder)


def test_no_such_kind_of_language_model(tmp_path: Path):
    folder = write_part(tmp_path / "llm", {"model_type": "parrot"}, {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"llm/config.json: no language model that transformers knows.*parrot"):
        load_model(QWEN2, language_model=folder)


def test_a_folder_without_a_config_or_that_is_not_there(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for part in ("vision", "language_model", "projector"):
        with pytest.raises(CheckpointError, match=r"empty: there is no config\.json"):
            load_model(QWEN2, **{part: tmp_path / "empty"})
        with pytest.raises(CheckpointError, match=r"nowhere: there is no such (folder|file)"):
            load_model(QWEN2, **{part: tmp_path / "nowhere"})


def test_a_part_is_no_whole_checkpoint(tmp_path: Path):
    """The message says where it belongs."""
    for folder in (bare_tower(tmp_path / "vit"), bare_language(tmp_path / "llm")):
        with pytest.raises(CheckpointError, match=r"model.vision_path or model.language_model_path"):
            load_model(folder)


def test_a_language_model_without_its_head_is_named(tmp_path: Path):
    """Saved from `LlamaModel`: other names, and nothing to predict with."""
    LlamaModel(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match=r"llm/model.safetensors|lm_head"):
        load_model(QWEN2, language_model=tmp_path / "llm")


@pytest.mark.parametrize("kind", ["intern_vit_6b", "internvl_vision"])
def test_a_towers_wrong_field_is_named_with_its_file(kind, tmp_path: Path):
    folder = bare_tower(tmp_path / "vit")
    originals.change_config(folder, model_type=kind, hidden_size="wide")
    with pytest.raises(CheckpointError, match=r"(?s)vit/config.json.*hidden_size"):
        load_model(QWEN2, vision=folder)


def test_a_base_keeps_its_own_files_untouched(tmp_path: Path):
    """Nothing is written where parts are read."""
    base = originals.copy_golden("qwen2_vit300m", tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    load_model(base, vision=bare_tower(tmp_path / "vit"), image_size=112)
    open_checkpoint(base)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert json.loads(before["config.json"]) == originals.golden("qwen2_vit300m").config
