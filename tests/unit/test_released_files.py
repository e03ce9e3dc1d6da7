"""What real files say that small made-up ones do not: each case was found in, or after, a released configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ivl_lightning.checkpoints import writer
from ivl_lightning.checkpoints.source import CheckpointError
from ivl_lightning.cli.convert import convert
from ivl_lightning.models.build import load_model
from ivl_lightning.models.checkpoint import open_checkpoint
from ivl_lightning.models.original_config import is_transposed, native_language_class
from tests import originals

FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 16.0]}


@pytest.mark.parametrize(
    ("family", "theta", "scaling"),
    [
        ("qwen2_300m", 10000.0, None),
        ("internlm2_6b", 1000000.0, {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}),
        ("phi3_300m", 10000.0, {"type": "longrope", **FACTORS}),
    ],
)
def test_rotary_settings_stand_in_both_spellings(family, theta, scaling, tmp_path: Path):
    """Version 4 of transformers reads `rope_theta` and `rope_scaling`, and takes defaults where they are missing."""
    source = originals.write_family(tmp_path / "source", family)
    convert(originals.settings(source, tmp_path / "hf", logits=False))
    text = json.loads((tmp_path / "hf/config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (theta, scaling)
    assert text["rope_parameters"]["rope_theta"] == theta
    assert text["architectures"][0].endswith("ForCausalLM")


@pytest.mark.parametrize("name", originals.GOLDEN)
def test_a_head_that_was_left_out_because_it_is_the_embeddings(name, tmp_path: Path):
    """Training code of the original could save a 1B so: `llm_config.tie_word_embeddings` true, and no head."""
    source = originals.copy_golden(name, tmp_path / "source")
    originals.change_config(source, llm_config={"tie_word_embeddings": True})
    tensors = load_file(source / "model.safetensors")
    head = "language_model.output.weight" if "internlm2" in name else "language_model.lm_head.weight"
    del tensors[head]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(originals.settings(source, tmp_path / "hf"))
    assert [entry.probe for entry in report.logits] == ["image", "text"]
    model = load_model(source)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


def test_an_internlm2_that_names_its_type_alone(tmp_path: Path):
    source = originals.copy_golden("internlm2_vit300m", tmp_path / "source")
    originals.change_config(source, llm_config={"architectures": None})
    assert native_language_class(open_checkpoint(source).config) == "InternLM2ForCausalLM"
    assert not convert(originals.settings(source, tmp_path / "hf")).faults


def test_a_tower_keeps_its_layer_and_the_order_of_its_tokens(tmp_path: Path):
    """A tower of InternVL 1.1 gives features of an earlier layer, down the columns; its parts go on doing so."""
    whole = originals.copy_golden("qwen2_vit300m", tmp_path / "whole", select_layer=-2, ps_version="v1")
    joint = load_model(vision=whole, language_model=whole, projector=whole)
    assert joint.config.vision_feature_layer == -2
    assert is_transposed(joint.config)
    pixels = originals.golden("qwen2_vit300m").inputs["pixel_values"]
    with torch.no_grad():
        features = [
            model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
            for model in (joint, load_model(whole))
        ]
    assert torch.equal(*features)


def test_logits_that_are_changed_behind_the_head_are_refused(tmp_path: Path):
    """Cohere scales them: a model with a plain head would compute something else."""
    config = AutoConfig.for_model("cohere", hidden_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=450)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match=r"llm/config.json: logit_scale=0\.0625"):
        load_model(originals.CHECKPOINTS / "qwen2_vit300m", language_model=tmp_path / "llm")


def test_phi3_by_itself_with_the_older_name_of_its_rotary_settings(tmp_path: Path):
    """`su` is what the first revisions call `longrope`; the window is a field beside it."""
    config = {**originals.PHI3, "vocab_size": 450}
    shaped = originals.family_config("phi3_300m")
    names = {name: shape for name, shape in originals.shapes(shaped).items() if name.startswith("language_model.")}
    tensors = {name.removeprefix("language_model."): value for name, value in originals.random_tensors(names).items()}
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "llm/model.safetensors", metadata={"format": "pt"})
    model = load_model(originals.CHECKPOINTS / "qwen2_vit300m", language_model=tmp_path / "llm")
    rope = model.config.text_config.rope_parameters
    assert (rope["rope_type"], rope["original_max_position_embeddings"]) == ("longrope", 32)


def test_a_source_without_a_tokenizer_has_no_known_image_token(tmp_path: Path):
    source = originals.write_family(tmp_path / "source", "qwen2_300m", tokenizer=False)
    report = convert(originals.settings(source, tmp_path / "hf"))
    assert any("<IMG_CONTEXT> is not known" in note and "151667" in note for note in report.notes)


@pytest.mark.parametrize("number", writer._NO_LOCKS)
def test_a_file_system_without_locks_does_not_stop_a_conversion(number, tmp_path: Path, monkeypatch):
    """NFS locks no folder that is open for reading, Lustre may lock nothing: no such disk is here, so its answer is."""

    def refuse(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(writer.fcntl, "flock", refuse)
    assert not convert(
        originals.settings(originals.CHECKPOINTS / "qwen2_vit300m", tmp_path / "hf", logits=False)
    ).faults


def test_an_hf_folder_with_stored_frequencies(tmp_path: Path):
    source = originals.write_family(tmp_path / "source", "qwen2_300m")
    convert(originals.settings(source, tmp_path / "hf", logits=False))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    assert not convert(originals.settings(tmp_path / "hf", tmp_path / "again")).faults
