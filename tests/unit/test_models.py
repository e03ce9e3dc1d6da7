"""Building, freezing, stochastic depth, checkpointing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from ivl_lightning.config.schema import ModelConfig
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.build import build_config, check_shapes, enable_activation_checkpointing, load_model
from ivl_lightning.models.checkpoint import EMBEDDINGS, HEAD, open_checkpoint
from ivl_lightning.models.cost import forward_cost, training_cost
from ivl_lightning.models.drop_path import DropPath, apply_drop_path
from ivl_lightning.models.freeze import frozen_modules, part_sizes, set_trainable
from ivl_lightning.models.loader import build_model
from ivl_lightning.models.tokenizer import image_token_id
from ivl_lightning.models.vocabulary import GrownVocabulary
from ivl_lightning.stages.root import InternVLWithLoss
from tests import tiny


def test_build_ties_nothing_and_knows_the_image_token(model, tokenizer):
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.config.image_token_id == image_token_id(tokenizer)
    assert model.config.text_config.vocab_size == len(tokenizer)


def test_random_positions_differ(tokenizer):
    """Left at zero, as the library does, patches would all look alike to a fresh tower."""
    tower = build_model(tiny.tiny_config(), tokenizer).model.vision_tower
    assert tower.embeddings.position_embeddings.std() > 0.01


def test_misspelt_shapes_are_named():
    with pytest.raises(ValueError, match=r"model.vision.hidden_sise.*did you mean hidden_size"):
        build_config(tiny.tiny_config(vision={"hidden_sise": 3}))
    with pytest.raises(ValueError, match=r"model_type is missing"):
        build_config(tiny.tiny_config(language_model={"hidden_size": 3}))
    with pytest.raises(ValueError, match=r"num_layers is not a field of Qwen2Config"):
        build_config(tiny.tiny_config(language_model={"model_type": "qwen2", "num_layers": 3}))


def test_saved_and_loaded_model_computes_the_same(model, tmp_path: Path):
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    check_shapes(loaded, tiny.tiny_config())


def test_weights_of_another_size_are_refused(model):
    other = {**tiny.tiny_config().language_model, "hidden_size": 64}
    with pytest.raises(ValueError, match=r"text_config.hidden_size=32, but model=tiny has 64"):
        check_shapes(model, tiny.tiny_config(language_model=other))


def test_load_model_says_what_is_wrong_with_a_folder(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no config.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="model_type is 'qwen2'"):
        load_model(str(tmp_path))


def test_a_vocabulary_that_grows(tmp_path: Path, tokenizer):
    """The folder has the tokenizer's n rows, three more are wanted: old rows stay, each new output row is the mean m of
    the old ones, new input rows are random with the library's spread, the same for the same seed.
    """
    tiny.build_tiny_model(tokenizer).save_pretrained(tmp_path)
    old = load_model(tmp_path)
    larger = [GrownVocabulary(open_checkpoint(tmp_path).tensors, len(tokenizer) + 3, std=0.02, seed=7) for _ in "ab"]
    head, embeddings = larger[0].read(HEAD), larger[0].read(EMBEDDINGS)
    before = old.lm_head.weight.detach()
    assert larger[0].meta(HEAD).shape == head.shape
    assert torch.equal(head[:-3], before)
    torch.testing.assert_close(head[-3:], before.mean(dim=0).expand(3, -1))
    assert torch.equal(embeddings[:-3], old.get_input_embeddings().weight)
    assert 0.005 < embeddings[-3:].std() < 0.05
    assert torch.equal(embeddings, larger[1].read(EMBEDDINGS))


def test_a_tokenizer_with_more_tokens_than_the_weights(tmp_path: Path, tokenizer):
    """The network gets a row for each of the tokenizer's tokens."""
    fewer = {**tiny.tiny_config().language_model, "vocab_size": len(tokenizer) - 5}
    config = tiny_network_config(fewer)
    InternVLForConditionalGeneration._from_config(config).save_pretrained(tmp_path)
    model = build_model(ModelConfig(path=str(tmp_path)), tokenizer)
    assert len(model.lm_head.weight) == len(tokenizer) == model.config.text_config.vocab_size


def tiny_network_config(language_model: dict[str, object]) -> InternVLConfig:
    return build_config(tiny.tiny_config(language_model=language_model))


def test_any_language_model(tokenizer):
    llama = {**tiny.tiny_config().language_model, "model_type": "llama"}
    model = tiny.build_tiny_model(tokenizer, language_model=llama)
    assert isinstance(model, InternVLForConditionalGeneration)
    assert type(model.model.language_model).__name__ == "LlamaModel"


def test_drop_path_rises_linearly_and_keeps_the_state_dict(model):
    """Rate 0.4 over 2 layers: 0.0 and 0.4, on both branches of each."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply_drop_path(model.model.vision_tower, 0.4)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.0, 0.4, 0.4])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_drop_path_is_off_in_eval_and_keeps_the_mean(model):
    """A branch of ones through rate 0.25: values are 0 or 4/3, a quarter of them 0, mean 1."""
    drop = DropPath(0.25).train()
    torch.manual_seed(0)
    out = drop(torch.ones(4000, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(out[:, 0], out[:, 1])
    pixels = torch.rand(2, 3, tiny.TILE_SIZE, tiny.TILE_SIZE)
    tower = model.model.vision_tower.eval()
    plain = tower(pixels).last_hidden_state
    apply_drop_path(tower, 0.5)
    assert torch.equal(tower(pixels).last_hidden_state, plain)
    torch.manual_seed(1)
    assert not torch.equal(tower.train()(pixels).last_hidden_state, plain)


def test_checkpointing_with_drop_path_gives_the_same_gradients(tokenizer):
    """The recomputed forward draws the same random numbers, so gradients are equal to the last bit."""
    batch = tiny.pack([tiny.random_document(np.random.default_rng(0), 12, tiles=6, trained=4)])
    gradients = []
    for checkpointing in (False, True):
        model = tiny.build_tiny_model(tokenizer)
        apply_drop_path(model.model.vision_tower, 0.5)
        if checkpointing:
            enable_activation_checkpointing(model)
        root = InternVLWithLoss(model, NextTokenLoss()).train()
        torch.manual_seed(5)
        root(batch)[0].backward()
        gradients.append({name: p.grad for name, p in root.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_set_trainable_and_sizes(model):
    set_trainable(model, ["projector"])
    sizes = {part.name: part for part in part_sizes(model)}
    assert sizes["vision"].trainable == sizes["llm"].trainable == 0
    assert sizes["projector"].trainable == sizes["projector"].total > 0
    assert sum(part.total for part in sizes.values()) == sum(p.numel() for p in model.parameters())


def test_last_vision_layers(model):
    set_trainable(model, ["vision", "projector"], last_vision_layers=1)
    names = [name for name, p in model.model.vision_tower.named_parameters() if p.requires_grad]
    assert names
    assert all(name.startswith("encoder.layer.1.") for name in names)
    frozen = frozen_modules(model)
    assert model.model.vision_tower.encoder.layer[0] in frozen
    assert model.model.vision_tower.encoder.layer[1] not in frozen


@pytest.mark.parametrize(
    ("parts", "layers", "message"),
    [([], None, "must name one or more"), (["vit"], None, "vision, projector, llm"), (["vision"], 9, "has 2 layers")],
)
def test_wrong_parts_are_named(model, parts, layers, message):
    with pytest.raises(ValueError, match=message):
        set_trainable(model, parts, last_vision_layers=layers)


def test_plain_config_needs_a_type():
    with pytest.raises(ValueError, match="model_type is missing"):
        build_config(ModelConfig())


@pytest.mark.parametrize(
    ("text", "token", "square"),
    [((896, 24, 14, 2, 4864), 0.72e9, 4.3e4), ((4096, 32, 32, 8, 14336), 14.0e9, 2.6e5)],
    ids=["1b", "8b"],
)
def test_forward_cost_of_published_sizes(text, token, square):
    """1B: 24 layers of Qwen2.5-0.5B have 0.358e9 weights, so 0.72e9; 2 * 24 * 896 = 43,008; a 300M tower 0.72e12."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = InternVLConfig(
        text_config=Qwen2Config(**dict(zip(names, text, strict=True))),
        vision_config=InternVLVisionConfig(
            hidden_size=1024, num_hidden_layers=24, intermediate_size=4096, image_size=448, patch_size=14
        ),
    )
    cost = forward_cost(config)
    assert cost == pytest.approx((token, square, 0.72e12), rel=0.02)
    assert training_cost(config, ["vision", "projector", "llm"]) == pytest.approx([3 * value for value in cost])
    frozen = training_cost(config, ["projector"])
    assert frozen == pytest.approx([2 * cost[0], 2 * cost[1], cost[2]]), "gradients pass the language model"
