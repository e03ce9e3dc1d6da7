"""docs/extending.md: its files are written, its commands run, and what they trained is looked at."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, InternVLForConditionalGeneration, Olmo2Config

from ivl_lightning.cli.chat import as_text
from ivl_lightning.cli.chat import read_config as chat_config
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import IGNORE_INDEX, PREFERENCE_STAGE
from ivl_lightning.data.conversation import encode_row
from ivl_lightning.data.templates import get_template, template_of
from ivl_lightning.inference.chat import Chat
from ivl_lightning.launch.compose import compose_stage, stage_names
from ivl_lightning.launch.overrides import check_keys, complete, forced
from ivl_lightning.launch.run_stage import run_stage, write_config
from ivl_lightning.models.checkpoint import read_config
from ivl_lightning.models.original_config import keep_record
from ivl_lightning.models.tokenizer import load_tokenizer
from ivl_lightning.structures import PairScores
from tests import tiny
from tests.pages import ROOT, commands, replaced, write_files

PAGE = ROOT / "docs/extending.md"
SMALL = [
    f"data.tile_size={tiny.TILE_SIZE}",
    "data.max_tokens=420",
    "data.max_pack_tiles=16",
    "data.num_workers=0",
    "data.packs_per_step=2",
    "data.batch_pairs=2",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.max_steps=2",
    "optim.lr=1e-2",
    "optim.warmup_steps=0",
    "callbacks=none",
]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """The page's files, and what stands for its capitals."""
    folder = tmp_path_factory.mktemp("extending")
    write_files(PAGE, folder)
    model = tiny.build_tiny_model(tokenizer)
    model.save_pretrained(folder / "MODEL")
    model.model.vision_tower.save_pretrained(folder / "VIT")
    shapes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    olmo = Olmo2Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **shapes)
    AutoModelForCausalLM.from_config(olmo).save_pretrained(folder / "LLM")
    for name in ("MODEL", "LLM", "TOKENIZER"):
        tokenizer.save_pretrained(folder / name)
    tiny.write_tiny_pairs(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        # As PYTHONPATH does for a command of its own.
        patch.syspath_prepend(folder / "mine")
        yield folder
    for module in ("norm_tuning", "own_losses", "own_templates"):
        sys.modules.pop(module, None)


def told(folder: Path, part: str) -> list[str]:
    """The page's one command with this word in it, its capitals replaced."""
    stand_ins = {name: folder / name for name in ("MODEL", "VIT", "LLM", "TOKENIZER")}
    data = {"META": folder / "data/meta.json", "PAIRS": folder / "data/pairs.json", "RUN": folder / "template"}
    (found,) = [words for words in commands(PAGE) if part in " ".join(words)]
    return replaced(found, {**stand_ins, **data})


def composed(folder: Path, run: str, part: str, *more: str) -> RunConfig:
    """The command's one stage, as `train.py` composes it."""
    words = told(folder, part)[2:]
    if words[0] == "--config-dir":
        words = [f"hydra.searchpath=[file://{folder / words[1]}]", *words[2:]]
    arguments = complete([*words, *more], ["none"])
    check_keys(arguments)
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        whole = compose("train", overrides=arguments)
        (name,) = stage_names(whole.stages, [name for name in whole.recipe.stages if name != PREFERENCE_STAGE])
        return compose_stage(name, arguments, run_dir=str(folder / run))


def trained(folder: Path, run: str, part: str) -> Path:
    """Run the command's stage in this process, small; the stage's folder."""
    config = composed(folder, run, part, *SMALL)
    stage = folder / run / config.stage.name
    write_config(config, stage)
    run_stage(stage)
    return stage


def changed(stage: Path, before: Path) -> set[str]:
    """Tensors that training has changed."""
    then, now = load_file(before / "model.safetensors"), load_file(stage / "weights/model.safetensors")
    assert set(then) == set(now)
    return {name for name, value in now.items() if not torch.equal(value, then[name])}


def test_a_stage_is_one_yaml_file(folder):
    stage = trained(folder, "stage", "stages=[projector_and_llm]")
    assert stage.name == "projector_and_llm"
    done = json.loads((stage / "done.json").read_text())
    assert (done["stage"], done["steps"], done["trained"]) == ("projector_and_llm", 2, ["projector", "llm"])
    names = changed(stage, folder / "MODEL")
    assert names
    assert not [name for name in names if name.startswith("vision_tower")]


def test_a_stage_of_a_class_of_ones_own(folder):
    """Of the language model the norms have moved, all of them, and nothing else; the projector has moved too."""
    names = changed(trained(folder, "norms", "norm_tuning.NormTuning"), folder / "MODEL")
    language = {name for name in names if name.startswith("language_model.")}
    every = {name for name in load_file(folder / "MODEL/model.safetensors") if name.startswith("language_model.")}
    assert language == {name for name in every if "norm" in name}
    assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector"}


def test_a_loss_head(folder):
    """By hand: two tokens of probabilities 1/4 and 1/2 and weights 1 and 2; with power 0.5 the sum is
    0.5 ln 4 + 2 sqrt(0.5) ln 2, and the gradient flows through the logarithm alone."""
    stage = trained(folder, "loss", "loss._target_=own_losses.ProbabilityWeighted")
    assert json.loads((stage / "done.json").read_text())["settings"]["loss.options.power"] == 0.5
    from own_losses import ProbabilityWeighted

    hidden = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2]]).log().requires_grad_()
    weighted, losses = ProbabilityWeighted(0.5)(hidden, torch.eye(2), torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    by_hand = 0.5 * torch.tensor(4.0).log() + 2 * 0.5**0.5 * torch.tensor(2.0).log()
    torch.testing.assert_close(weighted, by_hand)
    torch.testing.assert_close(losses, torch.tensor([4.0, 2.0]).log())
    weighted.backward()
    # w p^power (softmax - one-hot) = 0.5 (-3/4, 3/4), and 2 sqrt(0.5) (-1/2, 1/2).
    expected = torch.tensor([[-0.375, 0.375], [-(0.5**0.5), 0.5**0.5]])
    torch.testing.assert_close(hidden.grad, expected)


def test_a_preference_head(folder):
    """By hand: log-ratios 3 and 1 with beta 0.5 give a margin of 1, which an offset of 1 takes away: -log(1 / 2)."""
    stage = trained(folder, "pairs", "own_losses.OffsetPreference")
    settings = json.loads((stage / "done.json").read_text())["settings"]
    assert settings["preference.parts.offset.head.offset"] == 0.5
    assert settings["preference.parts.preference"] is None
    from own_losses import OffsetPreference

    chosen, rejected, reference, tokens = (torch.tensor([value]) for value in (-1.0, -3.0, -4.0, 2.0))
    pairs = PairScores(chosen, rejected, reference, reference, tokens, tokens)
    torch.testing.assert_close(OffsetPreference(beta=0.5, offset=1.0)(pairs), torch.tensor([2.0]).log())


def test_a_chat_template(folder, tokenizer):
    """The text is the page's, the answer and its end are trained, and the weights say it to others as Jinja."""
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    ids, labels = encode_row(row, tokenizer, template="own_templates:QWEN")
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    prompt = f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == f"{prompt}Hello!<|im_end|>\n"
    assert tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) == "Hello!<|im_end|>"

    weights = trained(folder, "template", "META model.template=own_templates:QWEN") / "weights"
    messages = [{"role": "user", "content": "Hi"}]
    told_others = load_tokenizer(str(weights)).apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=True,
        chat_template=(weights / "chat_template.jinja").read_text(),
    )
    assert told_others == prompt

    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        words = [*told(folder, "ivl-chat")[1:], "max_new_tokens=4", "device=cpu"]
        config = chat_config(compose("chat", overrides=forced([as_text(word) for word in words])))
    chat = Chat.from_config(config)
    assert chat.template == "own_templates:QWEN"
    assert list(chat.ask(config.prompt))


def test_nothing_is_imported_because_weights_say_so(folder, monkeypatch):
    """A template of one's own in config.json is used where its module is imported already, and refused elsewhere."""
    config = read_config(str(folder / "MODEL"))
    keep_record(config, "own_templates:QWEN")
    assert get_template("own_templates:QWEN").name == "qwen"
    assert template_of(None, config) == "own_templates:QWEN"
    monkeypatch.delitem(sys.modules, "own_templates")
    with pytest.raises(ValueError, match=r"was not imported: give template=own_templates:QWEN"):
        template_of(None, config)
    assert "own_templates" not in sys.modules
    assert template_of("own_templates:QWEN", config) == "own_templates:QWEN"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_template:QWEN", "cannot be imported: No module named 'own_template'"),
        ("own_templates:QWIN", "cannot be imported: .* has no attribute 'QWIN'"),
        ("own_templates:Template", "is of type type: it must be a Template"),
    ],
)
def test_a_template_that_is_not_there(folder, name, message):
    with pytest.raises(ValueError, match=message):
        template_of(name, None)


@pytest.mark.parametrize("part", ["model.language_model_path=LLM", "model=tiny_olmo"])
def test_a_language_model(folder, part):
    """OLMo 2, which no release of the family has: trained, written, and read by transformers alone."""
    stage = trained(folder, part.partition("=")[2], part)
    network = InternVLForConditionalGeneration.from_pretrained(stage / "weights")
    assert network.config.text_config.model_type == "olmo2"
    if stage.name == "mlp_warmup":
        before = AutoModelForCausalLM.from_pretrained(folder / "LLM").model.layers.state_dict()
        after = network.model.language_model.layers.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_recipe(folder):
    config = composed(folder, "recipe", "recipe=charts")
    assert (config.stage.name, config.recipe.name) == ("instruction_tuning", "charts")
    assert (config.optim.lr, config.trainer.max_epochs, config.data.batch_samples) == (1e-5, 2, 128)
