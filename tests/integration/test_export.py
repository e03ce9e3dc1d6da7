"""What a run has trained, exported: one process and shards of FSDP, adapters merged and beside, both layouts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoTokenizer, GotOcr2ImageProcessor, InternVLForConditionalGeneration, Qwen2ForCausalLM

from ivl_lightning.checkpoints.lightning_files import open_lightning
from ivl_lightning.checkpoints.source import CheckpointError
from ivl_lightning.cli.export import export
from ivl_lightning.config.chat import ChatConfig, ChatModel
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.convert import ExportConfig
from ivl_lightning.config.schema import LoraSettings, StrategyConfig
from ivl_lightning.inference.chat import Chat
from ivl_lightning.launch.run_stage import read_config, run_stage, write_config
from ivl_lightning.models.build import load_model
from tests import tiny
from tests.commands import own_arguments, train

STEPS = 2
STAGE = "instruction_tuning"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run on two ranks of FSDP, and one in this process with adapters on the language model."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*own_arguments(folder, steps=STEPS), "trainer.checkpoint_every_n_steps=1"]
    sharded = train(*common, f"run_dir={folder}/sharded", "strategy=fsdp", "trainer.devices=2")
    assert sharded.returncode == 0, sharded.stderr
    run_changed(folder, folder / "adapted", lora=LoraSettings(parts=["llm"]))
    return folder


def run_changed(runs: Path, run: Path, **changes: object) -> Path:
    """Train in this process what the sharded run trained, on one rank and with other settings; the stage's folder."""
    config = read_config(runs / "sharded" / STAGE)
    trainer = replace(config.trainer, devices=1)
    write_config(replace(config, trainer=trainer, strategy=StrategyConfig(), run_dir=str(run), **changes), run / STAGE)
    run_stage(run / STAGE)
    return run / STAGE


def exported(run: Path, target: Path, **settings: object) -> dict[str, object]:
    """Export; the report that lies in the target."""
    report = export(ExportConfig(run=str(run), target=str(target), progress_bar=False, **settings))
    content = json.loads((target / "parity.json").read_text())
    assert content["passed"]
    assert not report.faults
    return content


def plain(folder: Path) -> InternVLForConditionalGeneration:
    return InternVLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def states_equal(first: Path, second: Path) -> bool:
    one, other = plain(first).state_dict(), plain(second).state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_shards_of_the_last_step_are_the_weights_that_the_stage_left(runs: Path, tmp_path: Path) -> None:
    """The newest checkpoint is of the last step, so exporting it and exporting `weights` give the same bits."""
    content = exported(runs / "sharded", tmp_path / "newest", checkpoint="newest")
    exported(runs / "sharded", tmp_path / "weights")
    assert states_equal(tmp_path / "newest", tmp_path / "weights")
    assert [entry["logits"] for entry in content["logits"]] == [0.0, 0.0]


def test_an_earlier_checkpoint_is_another_network(runs: Path, tmp_path: Path) -> None:
    exported(runs / "sharded", tmp_path / "first", stage=STAGE, checkpoint="step=00000001.ckpt")
    assert not states_equal(tmp_path / "first", runs / "sharded" / STAGE / "weights")


def test_a_checkpoint_with_adapters_is_merged_into_its_base(runs: Path, tmp_path: Path) -> None:
    """A checkpoint holds the adapters alone; with the weights the run began with they are the weights it ended with."""
    exported(runs / "adapted", tmp_path / "newest", checkpoint="newest")
    assert states_equal(tmp_path / "newest", runs / "adapted" / STAGE / "weights")


def test_an_adapter_beside_its_base_is_the_merged_network(runs: Path, tmp_path: Path) -> None:
    """x W' with W' = W + s B A equals x W + s (x A^T) B^T: peft computes the second, to float32's rounding."""
    exported(runs / "adapted", tmp_path / "beside", adapter="beside")
    base = plain(tmp_path / "beside")
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "beside" / "adapter").eval())
    merged = logits(plain(runs / "adapted" / STAGE / "weights"))
    torch.testing.assert_close(adapted, merged, rtol=0, atol=5e-5)
    assert (before - merged).abs().max() > 1e-3
    # The folder of the adapter alone is a checkpoint too: its configuration names the base.
    loaded = load_model(tmp_path / "beside" / "adapter", attention="sdpa")
    torch.testing.assert_close(logits(loaded), merged, rtol=0, atol=0)


def test_the_original_layout_of_a_run_is_proven_by_the_reference_code(runs: Path, tmp_path: Path) -> None:
    content = exported(runs / "sharded", tmp_path / "original", layout="original")
    assert "reference code" in content["ran"][1]
    assert all(entry["logits"] < 1e-4 for entry in content["logits"])
    assert any("*.py" in note for note in content["notes"])


def test_plain_transformers_answers_as_the_chat(runs: Path, tmp_path: Path) -> None:
    """Greedy decoding is a function of weights, ids and pixels: equal to the last token where these are equal."""
    exported(runs / "sharded", tmp_path / "out")
    picture = tmp_path / "picture.png"
    Image.effect_noise((70, 40), 90).convert("RGB").save(picture)
    config = ChatConfig(model=ChatModel(path=str(tmp_path / "out")), max_new_tokens=12, device="cpu", max_tiles=4)
    chat = Chat.from_config(config)
    streamed = "".join(chat.ask("What is it?", images=[str(picture)]))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    processor = GotOcr2ImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(Image.open(picture), crop_to_patches=True, max_patches=4, return_tensors="pt")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    slots = "<IMG_CONTEXT>" * (tiny.TILE_TOKENS * len(pixels["pixel_values"]))
    ids = tokenizer(text.replace("<IMG_CONTEXT>", f"<img>{slots}</img>"), return_tensors="pt", add_special_tokens=False)
    model = plain(tmp_path / "out")
    answer = model.generate(**ids, pixel_values=pixels["pixel_values"], max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(pixels["pixel_values"]) > 1
    assert streamed.strip() == expected.strip()
    assert expected.strip()


def test_a_run_of_ps_version_v1_keeps_the_original_layout(runs: Path, tmp_path: Path) -> None:
    """Stage 2 starts from a v1 model (`ps_version` in its config.json) and leaves one: transformers cannot say v1."""
    source = tmp_path / "v1"
    shutil.copytree(Path(__file__).parents[1] / "fixtures/checkpoints/qwen2_vit300m", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "ps_version": "v1"}))
    before = read_config(runs / "sharded" / STAGE)
    model, data = replace(before.model, path=str(source)), replace(before.data, tile_size=56)
    stage = run_changed(runs, tmp_path / "run", model=model, data=data)
    written = json.loads((stage / "weights" / "config.json").read_text())
    assert (written["model_type"], written["ps_version"]) == ("internvl_chat", "v1")
    content = exported(tmp_path / "run", tmp_path / "out", layout="original")
    assert content["tensors"] > 100
    with pytest.raises(CheckpointError, match="layout=original"):
        exported(tmp_path / "run", tmp_path / "hf")


def test_a_run_starts_from_parts(tmp_path: Path) -> None:
    """A tower and a language model in folders of their own, no shapes and no tokenizer named: that of the latter."""
    arguments = [argument for argument in own_arguments(tmp_path, steps=1) if not argument.startswith("model.path")]
    whole = load_model(tmp_path / "model")
    whole.model.vision_tower.save_pretrained(tmp_path / "vit")
    Qwen2ForCausalLM(whole.config.text_config).save_pretrained(tmp_path / "llm")
    tiny.load_tiny_tokenizer().save_pretrained(tmp_path / "llm")
    parts = [f"model.vision_path={tmp_path}/vit", f"model.language_model_path={tmp_path}/llm"]
    ended = train(*arguments, *parts, f"run_dir={tmp_path}/run", "stage.trainable=[projector]")
    assert ended.returncode == 0, ended.stderr
    trained = load_model(tmp_path / "run" / STAGE / "weights").model.vision_tower.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in whole.model.vision_tower.state_dict().items())


def test_what_cannot_be_exported_says_why(runs: Path, tmp_path: Path) -> None:
    def message(error: type[Exception], run: Path, **settings: object) -> str:
        with pytest.raises(error) as raised:
            exported(run, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
        return str(raised.value)

    assert "no such folder" in message(ConfigError, runs / "nowhere")
    assert STAGE in message(ConfigError, runs / "sharded", stage="mlp_warmup")
    assert "step=00000002.ckpt" in message(ConfigError, runs / "sharded", stage=STAGE, checkpoint="step=9.ckpt")
    assert "holds no adapter" in message(CheckpointError, runs / "sharded", adapter="beside")
    assert "layout=hf" in message(ValueError, runs / "adapted", adapter="beside", layout="original")


def test_shards_without_their_end_are_refused(runs: Path, tmp_path: Path) -> None:
    """Ranks write their shards first and `.metadata` last: without it saving was interrupted."""
    cut = tmp_path / "cut.ckpt"
    shutil.copytree(next((runs / "sharded" / STAGE / "checkpoints").glob("*.ckpt")), cut)
    (cut / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="interrupted"):
        open_lightning(cut)
