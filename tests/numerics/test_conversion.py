"""What is loaded and written computes what the original computes: outputs, gradients, bits; broken maps are caught."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import InternVLForConditionalGeneration

from ivl_lightning.checkpoints.source import CheckpointError, Combined, MemorySource, Renamed, TensorSource
from ivl_lightning.checkpoints.splits import GroupedRows, Split
from ivl_lightning.checkpoints.views import AsNative, AsOriginal
from ivl_lightning.cli.convert import convert
from ivl_lightning.conversion.native_forward import forward, streamed_forward
from ivl_lightning.conversion.official_forward import OfficialOutputs, official_forward
from ivl_lightning.conversion.parity import LIBRARY, REFERENCE, STREAMED, LogitsParity, ParityReport
from ivl_lightning.conversion.write import ParityError, write_checkpoint
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.attention import boundaries
from ivl_lightning.models.build import load_model
from ivl_lightning.models.checkpoint import Checkpoint, open_checkpoint, table_of
from ivl_lightning.models.original_config import RECORD
from ivl_lightning.models.parts import text_config
from tests import originals
from tests.originals import difference

TOLERANCE = 1e-5
CLEAR = 0.01
NAMES = ["image", "text"]


@pytest.fixture(params=originals.GOLDEN)
def golden(request) -> originals.Golden:
    return originals.golden(request.param)


@cache
def loaded(name: str, attention: str = "sdpa") -> InternVLForConditionalGeneration:
    return load_model(originals.CHECKPOINTS / name, attention=attention)


def model_of(golden: originals.Golden, attention: str = "sdpa") -> InternVLForConditionalGeneration:
    return loaded(golden.folder.name, attention)


def logits_of(model: InternVLForConditionalGeneration, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Of one document; packed attention asks where it ends, the others take no notice."""
    with torch.no_grad():
        ends = boundaries(torch.tensor([0, ids.shape[1]], dtype=torch.int32), ids.device)
        return model(input_ids=ids, pixel_values=pixels, **ends).logits


def bits_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value, right[name]) for name, value in left.items()
    )


# -- against what the original's own code recorded ----------------------------------------------------------------


@pytest.mark.parametrize("attention", ["ivl_packed", "sdpa"])
def test_a_sample_with_images(golden, attention):
    inputs, reference = golden.inputs, golden.reference
    model = model_of(golden, attention)
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    logits = logits_of(model, inputs["input_ids"], inputs["pixel_values"])
    assert difference(tower, reference["vit_last_hidden_state"]) <= TOLERANCE
    assert difference(features, reference["vit_features"]) <= TOLERANCE
    assert difference(logits, reference["logits"]) <= TOLERANCE


@pytest.mark.parametrize("attention", ["ivl_packed", "sdpa"])
def test_text_alone(golden, attention):
    logits = logits_of(model_of(golden, attention), golden.inputs["text_only_input_ids"])
    assert difference(logits, golden.reference["text_only_logits"]) <= TOLERANCE


def test_a_batch_padded_on_the_right(golden):
    """Where the mask is 0 the original's outputs mean nothing."""
    mask = golden.inputs["batch_attention_mask"]
    with torch.no_grad():
        logits = model_of(golden)(
            input_ids=golden.inputs["batch_input_ids"],
            attention_mask=mask,
            pixel_values=golden.inputs["pixel_values"],
        ).logits
    real = mask == 1
    assert difference(logits[real], golden.reference["batch_logits"][real]) <= TOLERANCE


def losses(golden: originals.Golden, model: InternVLForConditionalGeneration) -> dict[str, Tensor]:
    """The original's two: the mean over supervised tokens, and sum(w * CE) / sum(w); position i predicts i + 1."""
    inputs = golden.inputs
    hidden = model.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).last_hidden_state
    labels, weights = inputs["labels"][0, 1:], inputs["loss_weight"][0, 1:]
    chosen = labels != -100
    mean = cross_entropy(model.lm_head(hidden)[0, :-1][chosen], labels[chosen])
    criterion = NextTokenLoss(normaliser="micro_batch_local")
    total, _ = criterion(hidden[0, :-1][chosen], model.lm_head.weight, labels[chosen], weights[chosen])
    weighted = criterion.normalise(total, weights[chosen], step_weight=1.0, packs_per_step=1)
    return {"loss": mean, "weighted_loss": weighted}


def gradients(golden: originals.Golden, kind: str) -> dict[str, Tensor]:
    """Under the original's names, fused as its weights are."""
    model = load_model(golden.folder, attention="sdpa")
    losses(golden, model)[kind].backward()
    native = {name: value.grad for name, value in model.named_parameters()}
    original = AsOriginal(MemorySource(native), table_of(model.config))
    return {name: original.read(name) for name in original.names()}


def test_losses(golden):
    with torch.no_grad():
        found = losses(golden, model_of(golden))
    for kind, value in found.items():
        assert abs(value.item() - golden.reference[kind].item()) <= TOLERANCE


@pytest.mark.parametrize("kind", ["loss", "weighted_loss"])
def test_gradients(golden, kind):
    """Largest difference over the largest entry of each recorded tensor; every other one by its norm."""
    found = gradients(golden, kind)
    recorded = {
        name.removeprefix(f"{kind}/"): value for name, value in golden.gradients.items() if name.startswith(f"{kind}/")
    }
    assert len(recorded) >= 13
    for name, value in recorded.items():
        assert difference(found[name], value) <= 1e-4 * value.abs().max().item(), name


def test_gradient_norms_of_every_parameter(golden):
    found = gradients(golden, "loss")
    norms = golden.meta["grad_norms"]
    assert found.keys() == norms.keys()
    for name, norm in norms.items():
        assert abs(found[name].norm().item() - norm) <= 1e-4 * norm, name


# -- there and back -----------------------------------------------------------------------------------------------


def test_there_and_back_is_the_same_file(golden, tmp_path: Path):
    """Tensors bit for bit, and the config.json that the original's code wrote."""
    there = convert(originals.settings(golden.folder, tmp_path / "hf"))
    back = convert(originals.settings(tmp_path / "hf", tmp_path / "back", layout="original"))
    assert there.ran == (REFERENCE, LIBRARY)
    assert back.ran == (STREAMED, REFERENCE)
    assert not there.faults + back.faults
    assert bits_equal(load_file(tmp_path / "back/model.safetensors"), golden.tensors)
    assert originals.read_config(tmp_path / "back") == known_config(golden)


def known_config(golden: originals.Golden) -> originals.Config:
    """Its config.json without the one entry that transformers drops from whatever it keeps: the hub's commit."""
    return {key: value for key, value in golden.config.items() if key != "_commit_hash"}


def test_the_library_reads_what_was_written(golden, tmp_path: Path):
    """By `from_pretrained` as users call it, to the recorded outputs; nothing is left over or missing."""
    convert(originals.settings(golden.folder, tmp_path / "hf"))
    model, information = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype="auto", output_loading_info=True
    )
    assert not any(information.values())
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(input_ids=golden.inputs["input_ids"], pixel_values=golden.inputs["pixel_values"]).logits
    assert difference(logits, golden.reference["logits"]) <= TOLERANCE
    assert model.config.image_token_id == golden.image_token_id


def test_what_the_library_saved_comes_back(golden, tmp_path: Path):
    """`save_pretrained` of a loaded model, which says of the original only what transformers' config keeps."""
    model = load_model(golden.folder)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert bits_equal(dict(model.state_dict()), dict(again.state_dict()))
    convert(originals.settings(tmp_path / "saved", tmp_path / "back", layout="original", logits=False))
    assert bits_equal(load_file(tmp_path / "back/model.safetensors"), golden.tensors)


# -- random models of every family --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=originals.FAMILIES)
def family(request, tmp_path_factory) -> Path:
    return originals.write_family(tmp_path_factory.mktemp("family") / request.param, request.param)


def sample(checkpoint: Checkpoint, *, length: int = 40) -> tuple[Tensor, Tensor]:
    """Ids with two tiles in them, longer than Phi-3's 32 positions before its factors change."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 400, (length,), generator=generator)
    words[3:7] = words[12:16] = checkpoint.config.image_token_id
    return words, torch.randn((2, 3, 56, 56), generator=generator)


def official(checkpoint: Checkpoint, ids: Tensor, pixels: Tensor | None) -> OfficialOutputs:
    """The reference forward pass of a folder in the original's layout."""
    original = checkpoint.original
    assert original is not None
    token = checkpoint.config.image_token_id
    return official_forward(original.tensors.read, original.values, ids, pixels, image_token_id=token)


def largest_differences(folder: Path) -> dict[str, float]:
    """`load_model` of a folder in the original's layout against the reference forward pass."""
    checkpoint = open_checkpoint(folder)
    model = load_model(folder, attention="sdpa")
    ids, pixels = sample(checkpoint)
    text = ids[ids != checkpoint.config.image_token_id]
    with torch.no_grad():
        tower = model.model.vision_tower(pixels).last_hidden_state
        here, here_text = forward(model, ids, pixels), forward(model, text, None)
        library = model(input_ids=ids[None], pixel_values=pixels).logits[0]
    there, there_text = official(checkpoint, ids, pixels), official(checkpoint, text, None)
    return {
        "tower": difference(tower, there.vision_hidden),
        "features": difference(here.image_features, there.image_features),
        "logits": difference(here.logits, there.logits),
        "library": difference(library, there.logits),
        "text": difference(here_text.logits, there_text.logits),
    }


def test_a_family_computes_what_the_reference_computes(family):
    assert all(value <= TOLERANCE for value in largest_differences(family).values())


def test_a_family_there_and_back(family, tmp_path: Path):
    """Both reports pass, tensors are the same bits, and all that config.json said stays."""
    there = convert(originals.settings(family, tmp_path / "hf"))
    back = convert(originals.settings(tmp_path / "hf", tmp_path / "back", layout="original"))
    assert not there.faults + back.faults
    assert [entry.probe for entry in there.logits] == [entry.probe for entry in back.logits] == NAMES
    assert bits_equal(load_file(tmp_path / "back/model.safetensors"), load_file(family / "model.safetensors"))
    assert originals.read_config(tmp_path / "back").items() >= originals.read_config(family).items()


def test_a_family_whose_folder_says_nothing_of_the_original(family, tmp_path: Path):
    """As of a network that transformers made: the original's config.json is made from its shapes, and proven too."""
    convert(originals.settings(family, tmp_path / "hf", logits=False))
    originals.change_config(tmp_path / "hf", internvl_chat=None)
    report = convert(originals.settings(tmp_path / "hf", tmp_path / "back", layout="original"))
    assert report.ran == (STREAMED, REFERENCE)
    assert [entry.probe for entry in report.logits] == NAMES
    assert not any("not compared" in note for note in report.notes)


def test_another_layers_features(tmp_path: Path):
    """InternVL 1.0 and 1.1 take them from before the last layers."""
    folder = originals.copy_golden("qwen2_vit300m", tmp_path / "source", select_layer=-2)
    assert all(value <= TOLERANCE for value in largest_differences(folder).values())
    report = convert(originals.settings(folder, tmp_path / "hf"))
    assert not report.faults
    assert convert(originals.settings(tmp_path / "hf", tmp_path / "back", layout="original")).ran is not None
    assert originals.read_config(tmp_path / "back")["select_layer"] == -2


def test_every_layer_is_read_where_it_is_used(family):
    """The streamed pass is the plain one with the memory of one layer: the same operations on the same numbers."""
    checkpoint = open_checkpoint(family)
    ids, pixels = sample(checkpoint)
    with torch.no_grad():
        plain = forward(load_model(family, attention="sdpa"), ids, pixels)
    streamed = streamed_forward(checkpoint.tensors, checkpoint.config, ids, pixels)
    assert difference(streamed.image_features, plain.image_features) <= 1e-6
    assert difference(streamed.logits, plain.logits) <= 1e-6


def test_the_streamed_pass_reads_each_tensor_once(golden):
    """Layer after layer."""
    checkpoint = open_checkpoint(golden.folder)
    asked: list[str] = []

    class Watched(Renamed):
        def read(self, name: str) -> Tensor:
            asked.append(name)
            return super().read(name)

    source = Watched(checkpoint.tensors, {name: name for name in checkpoint.tensors.names()})
    streamed_forward(source, checkpoint.config, golden.inputs["input_ids"][0], golden.inputs["pixel_values"])
    assert sorted(asked) == sorted(checkpoint.tensors.names())
    layers = [name.split(".layers.")[1].split(".")[0] for name in asked if "language_model.layers." in name]
    assert layers == sorted(layers)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_a_head_that_is_the_embeddings(layout, tmp_path: Path):
    """Transformers stores such a pair once; both layouts get two tensors of the same numbers."""
    convert(originals.settings(originals.CHECKPOINTS / "qwen2_vit300m", tmp_path / "hf", logits=False))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    originals.change_config(tmp_path / "hf", tie_word_embeddings=True, text_config={"tie_word_embeddings": True})
    model = load_model(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    report = convert(originals.settings(tmp_path / "hf", tmp_path / "target", layout=layout))
    assert not report.faults
    assert bits_equal(dict(load_model(tmp_path / "target").state_dict()), dict(model.state_dict()))
    config = originals.read_config(tmp_path / "target")
    assert not config["tie_word_embeddings"]
    assert not config["text_config" if layout == "hf" else "llm_config"]["tie_word_embeddings"]


# -- pixel shuffle v1 ---------------------------------------------------------------------------------------------


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    return originals.copy_golden("qwen2_vit300m", tmp_path / "v1", ps_version="v1")


def test_v1_is_computed_as_the_original_does(v1):
    """And differs clearly from v2 on the same weights: the tokens of a tile stand in another order."""
    assert all(value <= TOLERANCE for value in largest_differences(v1).values())
    checkpoint, golden = open_checkpoint(v1), originals.golden("qwen2_vit300m")
    ids, pixels = golden.inputs["input_ids"][0], golden.inputs["pixel_values"]
    with torch.no_grad():
        outputs = forward(load_model(v1, attention="sdpa"), ids, pixels)
    assert difference(outputs.logits, official(checkpoint, ids, pixels).logits) <= TOLERANCE
    assert difference(outputs.logits, golden.reference["logits"][0]) > CLEAR
    # A grid of 2 by 2 tokens transposed: the second and the third change places.
    assert difference(outputs.image_features, golden.reference["vit_features"][:, [0, 2, 1, 3]]) <= TOLERANCE


def test_a_config_that_does_not_name_a_version_is_v1(v1):
    originals.change_config(v1, ps_version=None)
    assert all(value <= TOLERANCE for value in largest_differences(v1).values())


def test_v1_is_refused_in_transformers_layout(v1, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"/v1 is of ps_version v1 .*Use layout=original"):
        convert(originals.settings(v1, tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_v1_stays_v1_in_the_originals_layout(v1, tmp_path: Path):
    report = convert(originals.settings(v1, tmp_path / "copy", layout="original"))
    assert not report.faults
    assert originals.read_config(tmp_path / "copy") == originals.read_config(v1)


# -- broken maps --------------------------------------------------------------------------------------------------


class Blocks(Split):
    """q, k and v one after the other, as Llama's fused projections have them."""

    def __init__(self, right: GroupedRows) -> None:
        self._ratio = right.heads // right.kv_heads

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        keys = tensor.shape[0] // (self._ratio + 2)
        return tensor.split([self._ratio * keys, keys, keys])

    def join(self, parts: Any) -> Tensor:
        return torch.cat(list(parts))


def wqkv_as_blocks(checkpoint: Checkpoint) -> TensorSource:
    assert checkpoint.original is not None
    right = table_of(checkpoint.config)

    class Broken:
        def to_native(self, original: str) -> Any:
            found = right.to_native(original)
            assert found is not None
            names, split = found
            return names, Blocks(split) if isinstance(split, GroupedRows) else split

    return AsNative(checkpoint.original.tensors, Broken())  # type: ignore[arg-type]


def exchanged(checkpoint: Checkpoint, one: str, other: str) -> TensorSource:
    """Tensors whose names hold one word lie where those with the other word should."""

    def swap(name: str) -> str:
        return name.replace(one, "\0").replace(other, one).replace("\0", other)

    return Renamed(checkpoint.tensors, {name: swap(name) for name in checkpoint.tensors.names()})


def unit_norms(checkpoint: Checkpoint) -> TensorSource:
    """As where the query norm is left out of the table and stays at its start."""
    names = [name for name in checkpoint.tensors.names() if "q_norm" in name]
    assert len(names) == 2
    ones = {name: torch.ones(tuple(checkpoint.tensors.meta(name).shape)) for name in names}
    return Combined([checkpoint.tensors, MemorySource(ones)])


BROKEN: dict[str, tuple[str, Callable[[Checkpoint], TensorSource]]] = {
    "wqkv as blocks": ("internlm2_6b", wqkv_as_blocks),
    "w1 and w3": ("internlm2_6b", lambda checkpoint: exchanged(checkpoint, "gate_proj", "up_proj")),
    "gate and up": ("qwen2_300m", lambda checkpoint: exchanged(checkpoint, "gate_proj", "up_proj")),
    "query norm of 1": ("qwen2_6b", unit_norms),
    "key and value": ("qwen2_300m", lambda checkpoint: exchanged(checkpoint, "attention.k_proj", "attention.v_proj")),
    "norms of a block": ("phi3_300m", lambda checkpoint: exchanged(checkpoint, "norm_before", "norm_after")),
    "layer scales": ("internlm2_6b", lambda checkpoint: exchanged(checkpoint, "lambda_1", "lambda_2")),
    "layers": ("llama_6b", lambda checkpoint: exchanged(checkpoint, "model.layers.0.", "model.layers.1.")),
    "embeddings and head": (
        "llama_6b",
        lambda checkpoint: exchanged(checkpoint, "lm_head", "model.language_model.embed_tokens"),
    ),
}


def refused(checkpoint: Checkpoint, target: Path, **changes: Any) -> ParityReport:
    """The report of a conversion that must fail, and what it must leave behind."""
    source = checkpoint.folder
    with pytest.raises(ParityError) as caught:
        write_checkpoint(checkpoint, originals.settings(source, target, **changes))
    kept = target.with_name(f"{target.name}.parity.json")
    assert not target.exists()
    assert sorted(path.name for path in target.parent.iterdir() if "target" in path.name) == [kept.name]
    report = caught.value.report
    assert str(kept) in str(caught.value)
    content = json.loads(kept.read_text())
    assert content["passed"] is False
    assert content["faults"] == report.faults
    assert report.faults
    return report


@pytest.mark.parametrize(
    ("mistake", "layout"),
    [
        *((mistake, "hf") for mistake in BROKEN),
        *((mistake, "original") for mistake in ("wqkv as blocks", "w1 and w3", "query norm of 1")),
    ],
)
def test_a_broken_map_is_caught(mistake, layout, tmp_path: Path):
    """All tensors go where the broken map says, bit for bit; only the outputs tell, and they tell clearly."""
    family, break_it = BROKEN[mistake]
    checkpoint = open_checkpoint(originals.write_family(tmp_path / "source", family))
    report = refused(replace(checkpoint, tensors=break_it(checkpoint)), tmp_path / "target", layout=layout)
    assert report.differing == []
    assert max(entry.relative for entry in report.logits) > CLEAR


def test_a_wrong_pixel_shuffle_is_caught(tmp_path: Path):
    """A v1 checkpoint taken for v2: only features and documents with tiles differ."""
    checkpoint = open_checkpoint(originals.copy_golden("qwen2_vit300m", tmp_path / "source", ps_version="v1"))
    setattr(checkpoint.config, RECORD, {**getattr(checkpoint.config, RECORD), "ps_version": "v2"})
    image, text = refused(checkpoint, tmp_path / "target").logits
    assert image.image_features is not None
    assert image.image_features > CLEAR
    assert image.relative > CLEAR
    assert text.relative <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "layout", "field", "value"),
    [
        ("llama_6b", "hf", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("llama_6b", "original", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("llama_6b", "original", "rms_norm_eps", 0.1),
        ("internlm2_6b", "hf", "hidden_act", "gelu"),
        ("qwen2_300m", "hf", "num_attention_heads", 3),
        ("phi3_300m", "hf", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_a_wrong_setting_is_caught(family, field, value, layout, tmp_path: Path):
    """No tensor shows it: theta 10000 for 500, another epsilon or activation, heads of twice the width."""
    checkpoint = open_checkpoint(originals.write_family(tmp_path / "source", family))
    changes = {field: value, **({"num_key_value_heads": 1} if field == "num_attention_heads" else {})}
    for key, entry in changes.items():
        setattr(text_config(checkpoint.config), key, entry)
    report = refused(checkpoint, tmp_path / "target", layout=layout)
    assert report.differing == []
    assert max(entry.relative for entry in report.logits) > 1e-3


def test_a_tensor_that_reads_differently_the_second_time_is_caught(tmp_path: Path):
    """As from a failing disk: what was written is not what is there."""
    name = "model.vision_tower.encoder.layer.1.mlp.fc1.bias"
    checkpoint = open_checkpoint(originals.write_family(tmp_path / "source", "qwen2_300m"))

    class Flickering(Renamed):
        reads = 0

        def read(self, key: str) -> Tensor:
            tensor = super().read(key)
            if key != name:
                return tensor
            self.reads += 1
            # The smallest step there is, in one number.
            return torch.nextafter(tensor, tensor + 1) if self.reads == 1 else tensor

    source = Flickering(checkpoint.tensors, {key: key for key in checkpoint.tensors.names()})
    report = refused(replace(checkpoint, tensors=source), tmp_path / "target")
    assert report.differing == [name]
    assert "1 tensors differ" in report.faults[0]
    assert name in report.faults[0]


def test_a_difference_that_is_no_number_is_a_fault():
    """Not a number is smaller than nothing, and must not pass for it."""
    parity = LogitsParity("image", 3, logits=float("nan"), spread=1.0, image_features=0.0)
    assert parity.relative == float("inf")
    assert LogitsParity("image", 3, 0.0, 1.0, float("nan")).relative == float("inf")
    assert LogitsParity("text", 3, logits=0.5, spread=2.0, image_features=None).relative == 0.25


def test_logits_that_are_all_alike_are_compared(tmp_path: Path):
    """A head of zeros: the spread is 0, and so is the difference."""
    config = originals.family_config("qwen2_300m")
    tensors = originals.random_tensors(originals.shapes(config))
    tensors["language_model.lm_head.weight"].zero_()
    source = originals.write_folder(tmp_path / "source", config, tensors, "qwen2_vit300m")
    assert not convert(originals.settings(source, tmp_path / "target")).faults


# -- types and shards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_bfloat16(golden, layout, tmp_path: Path):
    """Every tensor is rounded once; the outputs are compared with those of the rounded source."""
    report = convert(originals.settings(golden.folder, tmp_path / "target", layout=layout, dtype="bfloat16"))
    assert not report.faults
    tensors = load_file(tmp_path / "target/model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    original = open_checkpoint(golden.folder).tensors
    again = open_checkpoint(tmp_path / "target").tensors
    assert all(torch.equal(again.read(name), original.read(name).bfloat16()) for name in original.names())
    config = originals.read_config(tmp_path / "target")
    assert config["dtype" if layout == "hf" else "torch_dtype"] == "bfloat16"
    if layout == "hf":
        model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "target", dtype="auto")
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_numbers_too_large_for_float16_are_caught(tmp_path: Path):
    """65504 is the largest; 1e6 becomes infinite, and nothing is written."""
    config = originals.family_config("qwen2_300m")
    tensors = originals.random_tensors(originals.shapes(config))
    tensors["language_model.lm_head.weight"][7] = 1e6
    source = originals.write_folder(tmp_path / "source", config, tensors, "qwen2_vit300m")
    refused(open_checkpoint(source), tmp_path / "target", dtype="float16")


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "hf") for name in originals.GOLDEN), (originals.GOLDEN[1], "original")]
)
def test_shards(name, layout, tmp_path: Path):
    """None is above the limit unless one tensor is; the library reads them; back in one file they are the same bits."""
    golden, limit = originals.golden(name), 100_000
    convert(originals.settings(golden.folder, tmp_path / "shards", layout=layout, shard_gb=limit / 1e9))
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 5
    for file in files:
        tensors = load_file(tmp_path / "shards" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == tensors.keys()
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= limit
        with safe_open(tmp_path / "shards" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in golden.tensors.values())
    if layout == "hf":
        model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "shards")
        assert bits_equal(dict(model.state_dict()), dict(model_of(golden).state_dict()))
    convert(originals.settings(tmp_path / "shards", tmp_path / "back", layout="original", logits=False))
    assert bits_equal(load_file(tmp_path / "back/model.safetensors"), golden.tensors)


def test_a_large_target_is_compared_layer_by_layer(tmp_path: Path):
    """With the same outcome as by the library, to the last few bits."""
    golden = originals.golden("internlm2_vit300m")
    library = convert(originals.settings(golden.folder, tmp_path / "one"))
    streamed = convert(originals.settings(golden.folder, tmp_path / "two", memory_gb=0.0))
    assert streamed.ran == (REFERENCE, STREAMED)
    for here, there in zip(library.logits, streamed.logits, strict=True):
        assert abs(here.logits - there.logits) <= 1e-6


# -- adapters -----------------------------------------------------------------------------------------------------

WRAPPED = {"language_model.": "language_model.base_model.model.", "vision_model.": "vision_model.base_model.model."}
TARGETS = {
    "language_model.": ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "vision_model.": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
}


def adapted(tensors: dict[str, Tensor], part: str, *, rank: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The original's tensors as it saves a wrapped part, and what they are worth: W + 2 B A, as alpha is 2 * rank."""
    generator = torch.Generator().manual_seed(5)
    stored, merged = {}, {}
    for name, value in tensors.items():
        merged[name] = value
        if not name.startswith(part):
            stored[name] = value
            continue
        wrapped = name.replace(part, WRAPPED[part])
        layer, _, kind = wrapped.rpartition(".")
        if not layer.endswith(TARGETS[part]):
            stored[wrapped] = value
            continue
        stored[f"{layer}.base_layer.{kind}"] = value
        if kind == "weight":
            a = 0.1 * torch.randn(rank, value.shape[1], generator=generator)
            b = 0.1 * torch.randn(value.shape[0], rank, generator=generator)
            stored |= {f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
            merged[name] = value + 2 * b @ a
    return stored, merged


@pytest.fixture(params=["use_llm_lora", "use_backbone_lora"])
def lora(request, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder as the original saves it during training with LoRA, and the merged tensors."""
    golden = originals.golden("internlm2_vit300m")
    part = "language_model." if request.param == "use_llm_lora" else "vision_model."
    stored, merged = adapted(golden.tensors, part)
    config = {**golden.config, request.param: 4}
    return originals.write_folder(tmp_path / "lora", config, stored, "internlm2_vit300m"), merged


def test_adapters_of_the_original_are_merged(lora):
    """5 layers of each of 3 blocks of the language model, or 4 of the tower: base and A and B become one weight."""
    folder, merged = lora
    model = load_model(folder, attention="sdpa")
    found = AsOriginal(MemorySource(dict(model.named_parameters())), table_of(model.config))
    assert set(found.names()) == merged.keys()
    assert max(difference(found.read(name), value) for name, value in merged.items()) <= 1e-6
    golden = originals.golden("internlm2_vit300m")
    ids, pixels = golden.inputs["input_ids"][0], golden.inputs["pixel_values"]
    with torch.no_grad():
        outputs = forward(model, ids, pixels)
    expected = official_forward(merged.__getitem__, golden.config, ids, pixels, image_token_id=golden.image_token_id)
    assert difference(outputs.logits, expected.logits) <= TOLERANCE
    assert difference(outputs.logits, golden.reference["logits"][0]) > CLEAR


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_adapters_of_the_original_are_written_merged(lora, layout, tmp_path: Path):
    """Plain names, and no rank in config.json."""
    folder, merged = lora
    report = convert(originals.settings(folder, tmp_path / "target", layout=layout))
    assert not report.faults
    if layout == "hf":
        assert report.ran == (REFERENCE, LIBRARY)
        convert(originals.settings(tmp_path / "target", tmp_path / "back", layout="original"))
    written = tmp_path / ("back" if layout == "hf" else "target")
    tensors, config = load_file(written / "model.safetensors"), originals.read_config(written)
    assert tensors.keys() == merged.keys()
    assert max(difference(tensors[name], value) for name, value in merged.items()) <= 1e-6
    assert config.items() >= known_config(originals.golden("internlm2_vit300m")).items()


def test_half_an_adapter_is_named(tmp_path: Path):
    golden = originals.golden("internlm2_vit300m")
    stored, _ = adapted(golden.tensors, "language_model.")
    lost = "language_model.base_model.model.model.layers.1.attention.wo.lora_B.default.weight"
    del stored[lost]
    folder = originals.write_folder(tmp_path / "lora", golden.config, stored, "internlm2_vit300m")
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*wo\.lora_A\.default\.weight has no counterpart"):
        load_model(folder)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """The golden Qwen2 in transformers' layout, which nobody changes."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    convert(originals.settings(originals.CHECKPOINTS / "qwen2_vit300m", folder, logits=False))
    return folder


@pytest.fixture(scope="module")
def peft_adapter(hf, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of both parts as peft saves it, A and B moved; what peft's own merge makes of the network."""
    torch.manual_seed(0)
    network = InternVLForConditionalGeneration.from_pretrained(hf, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "fc1", "down_proj"]
    model = get_peft_model(network, LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.add_(0.05 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(folder)
    return folder, dict(model.merge_and_unload().state_dict())


def test_an_adapter_of_peft_is_merged_as_peft_does(hf, peft_adapter):
    """alpha / rank is 3."""
    folder, merged = peft_adapter
    found = dict(load_model(folder).state_dict())
    assert found.keys() == merged.keys()
    assert max(difference(found[name], value) for name, value in merged.items()) <= 1e-6
    base = load_model(hf).state_dict()
    assert max(difference(found[name], base[name]) for name in found) > CLEAR


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_an_adapter_is_converted_with_its_base(peft_adapter, layout, tmp_path: Path):
    folder, merged = peft_adapter
    report = convert(originals.settings(folder, tmp_path / "target", layout=layout))
    assert not report.faults
    assert [entry.probe for entry in report.logits] == NAMES
    found = dict(load_model(tmp_path / "target").state_dict())
    assert max(difference(found[name], value) for name, value in merged.items()) <= 1e-6


@pytest.fixture
def adapter(peft_adapter, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(peft_adapter[0], tmp_path / "adapter"))


def change_adapter(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        # peft takes W - B A of the start for the base here: with the file's A and B alone its merge is another.
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
    ],
)
def test_adapters_that_are_not_plain_are_refused(adapter, changes):
    """Merging them as plain ones would give other weights than peft's."""
    change_adapter(adapter, **changes)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: only plain LoRA .*merge it with peft") as caught:
        load_model(adapter)
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize("start", [True, False, "gaussian", None])
def test_starts_that_leave_the_base_alone_are_plain(adapter, peft_adapter, start):
    change_adapter(adapter, init_lora_weights=start)
    found = load_model(adapter).state_dict()
    assert max(difference(found[name], value) for name, value in peft_adapter[1].items()) <= 1e-6


def test_an_adapter_whose_base_is_gone_is_named(adapter, tmp_path: Path):
    change_adapter(adapter, base_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"adapter_config.json names the base model .*base_model_name_or_path"):
        load_model(adapter)


def test_an_adapter_of_another_network_is_named(adapter, tmp_path: Path):
    """Its layers are not there, or of another width."""
    other = originals.write_family(tmp_path / "other", "phi3_300m")
    change_adapter(adapter, base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError, match="q_proj"):
        load_model(adapter)
