"""LoRA on the command line: killed and continued, merged weights and the adapter alone, the next stage."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, InternVLForConditionalGeneration

from ivl_lightning.checkpoints.parts import PartsReader
from ivl_lightning.config.schema import LoraSettings
from ivl_lightning.launch.finished import weights_hash
from ivl_lightning.launch.run_stage import read_config, run_stage, write_config
from ivl_lightning.models.build import load_model
from tests import tiny
from tests.commands import kill_behind, logged, logged_steps, own_arguments, train

STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with adapters on both parts and a projector that trains in full, killed behind step 3 and continued."""
    folder = tmp_path_factory.mktemp("lora")
    options = [
        *own_arguments(folder, steps=STEPS),
        "lora=all",
        "lora.rank=4",
        "stage.trainable=[vision,projector,llm]",
        "optim.lr=1e-2",
        "optim.warmup_steps=0",
        "trainer.checkpoint_every_n_steps=1",
    ]
    stage = folder / "run/instruction_tuning"
    saved = kill_behind(stage, "step=0000000[3-9].ckpt", *options)
    lines = len(logged_steps(stage))
    again = train(*options, f"run_dir={folder}/run")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "(LoRA)" in again.stdout
    assert min(logged_steps(stage)[lines:]) == saved + 1
    return stage


def stage_beside(run, name, **changes):
    """Run a stage in this process with the settings of `run`, but for some; returns its folder."""
    config, folder = read_config(run), run.parent / name
    write_config(replace(config, logger={}, callbacks={}, **changes), folder)
    run_stage(folder)
    return folder


def test_killed_and_started_again(run):
    """Every loss equals that of a run that was never killed, with LoRA dropout and drop path at work.

    The random numbers of a micro-batch follow from its rows, so a second start draws what the first would have drawn.
    A checkpoint holds what trains alone, which is less than half of this network.
    """
    config = read_config(run)
    assert config.lora.dropout == 0.05
    assert config.stage.drop_path_rate == 0.1
    whole = stage_beside(run, "whole")
    assert len(logged(run, "train/loss")) == STEPS
    assert logged(run, "train/loss") == logged(whole, "train/loss")
    ours, wanted = (load_file(stage / "weights/model.safetensors") for stage in (run, whole))
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())
    kept = PartsReader(next((run / "checkpoints").glob("*.ckpt"))).names()
    network = [name for name in kept if name.startswith("state_dict.root.internvl.")]
    assert network
    assert all(".lora_" in name or "multi_modal_projector" in name for name in network)
    assert json.loads((run / "done.json").read_text())["trained"] == ["vision (LoRA)", "projector", "llm (LoRA)"]


def logits(network):
    ids = torch.cat([torch.full((1, 4), network.config.image_token_id), torch.arange(4, 20).unsqueeze(0)], dim=1)
    pixels = torch.linspace(-1, 1, 3 * tiny.TILE_SIZE**2).view(1, 3, tiny.TILE_SIZE, tiny.TILE_SIZE)
    with torch.no_grad():
        return network.eval()(input_ids=ids, pixel_values=pixels).logits


def test_the_folder_of_weights_is_a_plain_network(run):
    """Its names are the base's, and it is not the base; the note in the adapter's folder names the projector."""
    base, merged = (load_model(str(folder), attention="sdpa") for folder in (run.parents[1] / "model", run / "weights"))
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not torch.allclose(logits(base), logits(merged), atol=1e-2)
    moved = {name for name, value in merged.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    adapted = {name for name in moved if "multi_modal_projector" not in name}
    assert len(adapted) == 2 * (6 + 7), "the linear layers of two blocks each"
    assert all(
        name.endswith(("proj.weight", "projection_layer.weight", "fc1.weight", "fc2.weight")) for name in adapted
    )
    assert len(moved) > len(adapted)
    assert "projector trained in full" in (run / "adapter/README.md").read_text()


def test_the_next_stage_starts_from_merged_weights_and_its_adapter_is_read_by_peft(run):
    """Stage 1 with adapters on the language model alone, from the folder of weights of the run.

    `base_model_name_or_path` of its adapter is that folder: base and adapter, read by plain peft, give the logits of
    its own merged weights.
    """
    config = read_config(run)
    stage = replace(
        config.stage,
        _target_="ivl_lightning.stages.mlp_warmup.MLPWarmup",
        name="mlp_warmup",
        trainable=None,
    )
    trainer = replace(config.trainer, max_steps=2)
    lora = LoraSettings(parts=["llm"], rank=2)
    after = stage_beside(run, "mlp_warmup", stage=stage, trainer=trainer, lora=lora, init_from=str(run / "weights"))
    done = json.loads((after / "done.json").read_text())
    assert done["input_weights"] == weights_hash(run / "weights") != done["output_weights"]
    assert done["trained"] == ["llm (LoRA)"]
    assert not (after / "adapter/README.md").exists()
    base = json.loads((after / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(run / "weights")
    plain = InternVLForConditionalGeneration.from_pretrained(base)
    by_peft = PeftModel.from_pretrained(plain, after / "adapter")
    wanted = logits(InternVLForConditionalGeneration.from_pretrained(after / "weights"))
    torch.testing.assert_close(logits(by_peft), wanted, atol=1e-5, rtol=1e-5)
    assert AutoConfig.from_pretrained(after / "weights").to_dict() == plain.config.to_dict() | {
        "_name_or_path": str(after / "weights")
    }


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra qlora")
def test_a_4_bit_run_writes_weights_of_full_precision(run):
    """Language model in 4 bits: the loss moves, and what has no adapter is written to the last bit as it was read.

    Base and adapter, read by plain peft, are the merged weights: both are W + s B A with the W that was read.
    """
    lora = LoraSettings(parts=["llm"], rank=2, quantize="nf4", targets={"llm": ["q_proj"]})
    stage = replace(read_config(run).stage, trainable=None)
    after = stage_beside(run, "qlora", stage=stage, lora=lora)
    assert len(set(logged(after, "train/loss").values())) == STEPS
    source = run.parents[1] / "model"
    before, merged = (load_file(folder / "model.safetensors") for folder in (source, after / "weights"))
    assert merged.keys() == before.keys()
    moved = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert moved == {f"language_model.model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    by_peft = PeftModel.from_pretrained(InternVLForConditionalGeneration.from_pretrained(source), after / "adapter")
    wanted = logits(InternVLForConditionalGeneration.from_pretrained(after / "weights"))
    torch.testing.assert_close(logits(by_peft), wanted, atol=1e-5, rtol=1e-5)
