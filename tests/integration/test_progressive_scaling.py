"""Progressive scaling at work: a donor's tower in networks that train, its proof, what is recorded, and going on."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLForConditionalGeneration, Qwen2ForCausalLM

from ivl_lightning.callbacks.packing_stats import PackingStats
from ivl_lightning.callbacks.progressive_scaling import ProgressiveScaling
from ivl_lightning.checkpoints.lineage import (
    Lineage,
    PartRecord,
    ancestors,
    read_lineage,
    tower_tokens,
    write_lineage,
)
from ivl_lightning.checkpoints.source import CheckpointError
from ivl_lightning.checkpoints.weights import tensors_hash
from ivl_lightning.cli import stage as stage_command
from ivl_lightning.cli.export import export
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.convert import ExportConfig
from ivl_lightning.config.schema import LoraSettings, OptimConfig, RunConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.launch.chain import run_chain
from ivl_lightning.launch.command import stage_configs
from ivl_lightning.launch.overrides import complete
from ivl_lightning.launch.run_stage import read_config, run_stage, write_config
from ivl_lightning.models.assembly import JOINT, LANGUAGE, TOWER
from ivl_lightning.models.build import load_model
from ivl_lightning.models.donor import DonorError
from ivl_lightning.models.loader import ConfiguredNetwork
from ivl_lightning.models.tokenizer import load_tokenizer
from ivl_lightning.reporting.logged_metrics import read_metrics
from ivl_lightning.stages.base import Stage
from ivl_lightning.stages.mlp_warmup import MLPWarmup
from ivl_lightning.stages.vit_incremental import ViTIncremental
from tests import originals, tiny
from tests.commands import train

ALL = ["vision", "projector", "llm"]


@dataclass(frozen=True)
class Folders:
    """Checkpoints of tiny networks, all different.

    Attributes:
        root: everything lies here.
        base: a whole network.
        donor: another, with a language model as wide as the base's (32).
        wide: another, with one of width 48.
        llm: a language model of its own.
        meta: data.
    """

    root: Path
    base: Path
    donor: Path
    wide: Path
    llm: Path
    meta: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("scaling")
    language = {**tiny.tiny_config().language_model, "hidden_size": 48}
    save(tiny_network(1), root / "base")
    save(tiny_network(2), root / "donor")
    save(tiny_network(3, language_model=language), root / "wide")
    torch.manual_seed(4)
    Qwen2ForCausalLM(tiny_network(4).config.text_config).save_pretrained(root / "llm")
    tiny.load_tiny_tokenizer().save_pretrained(root / "llm")
    meta = tiny.write_tiny_data(root / "data")
    return Folders(root, root / "base", root / "donor", root / "wide", root / "llm", meta)


def tiny_network(seed: int, **changes: Any) -> InternVLForConditionalGeneration:
    return tiny.build_tiny_model(tiny.load_tiny_tokenizer(), seed, **changes)


def save(model: InternVLForConditionalGeneration, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.load_tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder: Path, *prefixes: str) -> dict[str, Tensor]:
    return part(load_model(folder), *prefixes)


def part(model: torch.nn.Module, *prefixes: str) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.startswith(prefixes or "")}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    assert found, "nothing to compare"
    return found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


# -- a trainer of one's own -------------------------------------------------------------------------------------------


class Begin(Callback):
    """The network as training begins."""

    def __init__(self) -> None:
        self.model: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self.model = part(pl_module.internvl)

    def part(self, *prefixes: str) -> dict[str, Tensor]:
        return {name: value for name, value in self.model.items() if name.startswith(prefixes)}


def configured(folders: Folders, **changes: Any) -> ConfiguredNetwork:
    """The base, read from its folder."""
    return ConfiguredNetwork(tiny.tiny_config(path=str(folders.base), **changes), tiny.load_tiny_tokenizer())


def warmup(source: Any, **settings: Any) -> MLPWarmup:
    return MLPWarmup(source, optim=OptimConfig(lr=1e-2, warmup_steps=0), **settings)


def data_of(folders: Folders) -> DynamicPackingDataModule:
    config = tiny.tiny_data_config(folders.meta, packs_per_step=2, max_tokens=420)
    return DynamicPackingDataModule(config, tiny.load_tiny_tokenizer(), patch_size=tiny.PATCH_SIZE)


def trainer_of(folder: Path, *callbacks: Callback, steps: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[PackingStats(), *callbacks],
    )


def fit(folders: Folders, stage: Stage, folder: Path, *callbacks: Callback, steps: int = 1) -> L.Trainer:
    trainer = trainer_of(folder, *callbacks, steps=steps)
    trainer.fit(stage, data_of(folders))
    return trainer


def recorded(folder: Path) -> Lineage:
    lineage = read_lineage(folder)
    assert lineage is not None
    return lineage


@pytest.mark.parametrize(
    ("name", "projector", "brings"),
    [("donor", "match", "donor"), ("donor", "new", "base"), ("wide", "match", "base")],
)
def test_tower_of_the_donor_language_model_of_the_base(
    folders: Folders, name: str, projector: Any, brings: str, tmp_path: Path
) -> None:
    """Bit for bit, as training begins. The projector is the donor's at widths 32 and 32 and not at 48 and 32; what is
    frozen is the same after a step, and its hash in lineage.json is that of the donor's own tensors.
    """
    donor, begin = getattr(folders, name), Begin()
    stage = warmup(configured(folders))
    fit(folders, stage, tmp_path, ProgressiveScaling(str(donor), projector=projector), begin)
    assert same(begin.part(TOWER), tensors_of(donor, TOWER))
    assert same(begin.part(*LANGUAGE), tensors_of(folders.base, *LANGUAGE))
    assert same(begin.part(JOINT), tensors_of(getattr(folders, brings), JOINT))
    assert same(part(stage.internvl, TOWER), tensors_of(donor, TOWER))
    assert not same(part(stage.internvl, JOINT), begin.part(JOINT))
    lineage = recorded(tmp_path)
    wanted = tensors_hash((key.removeprefix(TOWER), value) for key, value in tensors_of(donor, TOWER).items())
    assert lineage.parts["vision"].before == lineage.parts["vision"].after == wanted
    assert lineage.parts["projector"].before != lineage.parts["projector"].after
    assert lineage.parts["llm"].before is lineage.parts["llm"].after is None
    carried = ["vision", "projector"] if brings == name else ["vision"]
    assert [(origin.path, origin.brings, origin.donor) for origin in lineage.origins] == [
        (str(folders.base), [name for name in ALL if name not in carried], False),
        (str(donor), carried, True),
    ]
    assert (lineage.stage, lineage.steps, lineage.trained) == ("MLPWarmup", 1, ["projector"])


@pytest.mark.parametrize("kind", ["function", "ready", "random"])
def test_any_source_of_a_network_takes_the_tower(folders: Folders, kind: str, tmp_path: Path) -> None:
    """A function, a network that stands, one of random weights: their own towers are replaced, the rest is theirs."""
    tokenizer = tiny.load_tiny_tokenizer()
    sources: dict[str, Callable[[], Any]] = {
        "function": lambda: lambda: tiny_network(5),
        "ready": lambda: tiny_network(5),
        "random": lambda: ConfiguredNetwork(tiny.tiny_config(random_weights=True), tokenizer, seed=5),
    }
    random = ConfiguredNetwork(tiny.tiny_config(), tokenizer, seed=5).build()
    own = random if kind == "random" else tiny_network(5)
    begin = Begin()
    fit(folders, warmup(sources[kind]()), tmp_path, ProgressiveScaling(str(folders.donor)), begin)
    assert same(begin.part(TOWER, JOINT), tensors_of(folders.donor, TOWER, JOINT))
    assert same(begin.part(*LANGUAGE), part(own, *LANGUAGE))
    assert [origin.path for origin in recorded(tmp_path).origins] == [str(folders.donor)]


@pytest.mark.parametrize(("stored", "used"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_weights_take_the_type_of_the_network(folders: Folders, stored: str, used: str, tmp_path: Path) -> None:
    """float32 is rounded to bfloat16, bfloat16 is float32 as it is; the proof compares in the network's type."""
    model = tiny_network(2).to(getattr(torch, stored))
    donor, dtype = save(model, tmp_path / "donor"), getattr(torch, used)
    begin = Begin()
    stage = warmup(configured(folders, dtype=used))
    fit(folders, stage, tmp_path / "fit", ProgressiveScaling(str(donor)), begin)
    assert {value.dtype for value in begin.model.values()} == {dtype}
    assert same(begin.part(TOWER), {name: value.to(dtype) for name, value in part(model, TOWER).items()})


def test_a_projector_of_columns_stays_out_of_a_network_of_rows(tmp_path: Path) -> None:
    """`ps_version` v1 beside v2, of golden checkpoints that are equally wide; by hand, without a fit."""
    base, donor = originals.CHECKPOINTS / "internlm2_vit300m", tmp_path / "v1"
    originals.copy_golden("qwen2_vit300m", donor, ps_version="v1")
    stage = warmup(
        ConfiguredNetwork(tiny.tiny_config(path=str(base), vision={}, language_model={}), load_tokenizer(base))
    )
    ProgressiveScaling(str(donor)).setup(trainer_of(tmp_path), stage, "fit")
    stage.configure_model()
    assert same(part(stage.internvl, TOWER), tensors_of(donor, TOWER))
    assert same(part(stage.internvl, JOINT), tensors_of(base, JOINT))


class Overwrite(Callback):
    """Writes other bytes into the donor's file, once the network has been read from it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        size = self._file.stat().st_size
        with self._file.open("r+b") as stream:
            stream.seek(size - 4)
            stream.write(b"\x00\x00\x80\x3f")


def test_a_donor_that_changes_while_it_is_read_is_noticed(folders: Folders, tmp_path: Path) -> None:
    """The last number of its file becomes 1.0. That of the file's last tensor is then not what the network has."""
    donor = tmp_path / "donor"
    shutil.copytree(folders.donor, donor)
    tensors = {name: value for name, value in load_file(donor / "model.safetensors").items() if "language" not in name}
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    begin = Begin()
    callbacks = Overwrite(donor / "model.safetensors"), ProgressiveScaling(str(donor)), begin
    with pytest.raises(RuntimeError, match=r"of the network are not what .*donor holds") as caught:
        fit(folders, warmup(configured(folders)), tmp_path / "fit", *callbacks)
    assert str(caught.value).startswith(f"scaling.donor={donor}: model.")
    assert not begin.model
    assert read_lineage(tmp_path / "fit") is None


def test_a_damaged_lineage_stops_a_fit_before_it_begins(folders: Folders, tmp_path: Path) -> None:
    """And not when it has trained for hours."""
    donor, begin = with_lineage(folders, tmp_path / "donor"), Begin()
    (donor / "lineage.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"{donor}/lineage.json is not valid JSON"):
        fit(folders, warmup(configured(folders)), tmp_path / "fit", ProgressiveScaling(str(donor)), begin)
    assert not begin.model


def with_lineage(folders: Folders, folder: Path) -> Path:
    """The donor, and a record of the stage that made it: 7 steps on 70 tokens."""
    shutil.copytree(folders.donor, folder)
    parts = {"vision": PartRecord(1, None, "hash")}
    write_lineage(Lineage("made", str(folder), ["vision"], 7, 70, parts, []), folder)
    return folder


class WriteIntoTower(Callback):
    """What no one should do: frozen weights move."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, *_: Any) -> None:
        with torch.no_grad():
            pl_module.internvl.model.vision_tower.embeddings.cls_token.add_(1.0)


def test_a_frozen_tower_that_moved_is_not_handed_on(folders: Folders, tmp_path: Path) -> None:
    """In a stage that trains the tower the same is no fault."""
    with pytest.raises(RuntimeError, match="froze the vision tower, but its weights have changed"):
        fit(folders, warmup(configured(folders)), tmp_path, ProgressiveScaling(), WriteIntoTower())
    assert read_lineage(tmp_path) is None
    stage = ViTIncremental(configured(folders))
    fit(folders, stage, tmp_path, ProgressiveScaling(stage="1.5"), WriteIntoTower())
    assert recorded(tmp_path).stage == "1.5"


def test_validated_before_and_after(folders: Folders, tmp_path: Path) -> None:
    """A network that is validated first has the donor's tower then, and the fit goes on with it."""
    stage, callback = warmup(configured(folders)), ProgressiveScaling(str(folders.donor))
    trainer = trainer_of(tmp_path, callback)
    data = data_of(folders)
    trainer.validate(stage, data, verbose=False)
    assert same(part(stage.internvl, TOWER), tensors_of(folders.donor, TOWER))
    trainer.fit(stage, data)
    trainer.validate(stage, data, verbose=False)
    lineage = recorded(tmp_path)
    assert lineage.origins[-1].brings == ["vision", "projector"]
    assert lineage.parts["vision"].before == lineage.parts["vision"].after


def test_a_callback_begins_anew_with_each_fit(folders: Folders, tmp_path: Path) -> None:
    """Two stages one after another: the hash before is that of each one's own tower. And one stage fitted twice: the
    donor's tower, which it may have trained since, is not brought a second time.
    """
    callback, begin = ProgressiveScaling(str(folders.donor)), Begin()
    stage = ViTIncremental(configured(folders), optim=OptimConfig(lr=1e-2, warmup_steps=0))
    fit(folders, stage, tmp_path / "first", callback)
    trained = part(stage.internvl, TOWER)
    assert not same(trained, tensors_of(folders.donor, TOWER))
    fit(folders, stage, tmp_path / "again", callback, begin)
    assert same(begin.part(TOWER), trained)
    first, again = (recorded(tmp_path / name).parts["vision"] for name in ("first", "again"))
    assert first.before != first.after == again.before != again.after
    fit(folders, warmup(configured(folders)), tmp_path / "other", callback)
    assert recorded(tmp_path / "other").parts["vision"].after == first.before


def test_a_network_that_stands_takes_no_tower(folders: Folders, tmp_path: Path) -> None:
    stage = warmup(configured(folders))
    stage.configure_model()
    with pytest.raises(DonorError, match="the network stands already"):
        fit(folders, stage, tmp_path, ProgressiveScaling(str(folders.donor)))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_the_special_tokens_is_refused(folders: Folders, tmp_path: Path) -> None:
    """Before anything is built; the donor's own is looked at when it is opened."""
    data = data_of(folders)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(originals.CHECKPOINTS / "qwen2_vit300m" / file, tmp_path)
    data.tokenizer = load_tokenizer(tmp_path)
    data.tokenizer.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"], special_tokens=True)
    stage = warmup(configured(folders))
    with pytest.raises(DonorError, match=r"the tokenizer of this run lacks the special tokens <quad>, </quad>, <ref>"):
        trainer_of(tmp_path, ProgressiveScaling(str(folders.donor))).fit(stage, data)
    assert stage.root is None


def test_going_on_under_a_trainer_of_one_s_own(folders: Folders, tmp_path: Path) -> None:
    """The trained tower of the checkpoint stays; lineage.json is that of a fit which was never stopped.

    Counted by hand: 2 steps, and the tokens of the packs that were trained.
    """

    def begun(steps: int, *callbacks: Callback, checkpoint: Path | None = None) -> dict[str, Tensor]:
        stage = ViTIncremental(configured(folders), optim=OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant"))
        trainer = trainer_of(tmp_path, ProgressiveScaling(str(folders.donor)), *callbacks, steps=steps)
        trainer.fit(stage, data_of(folders), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return part(stage.internvl, TOWER)

    counter = Tokens()
    whole = begun(2, counter, ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1))
    lineage = recorded(tmp_path)
    assert (lineage.steps, lineage.tokens) == (2, counter.tokens)
    (tmp_path / "lineage.json").unlink()
    assert same(begun(2, checkpoint=next((tmp_path / "kept").glob("*step=1.ckpt"))), whole)
    assert recorded(tmp_path) == lineage


class Tokens(Callback):
    """Counts the tokens of the packs that were trained, by the plan."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, *_: Any) -> None:
        self.tokens += batch.planned.pack.tokens


# -- the command line -------------------------------------------------------------------------------------------------


def settings_of(folders: Folders, *arguments: str) -> dict[str, RunConfig]:
    """Stage name -> what `train.py` would run with these arguments and the tiny data."""
    recipes = [path.name.removesuffix(".yaml") for path in files("ivl_lightning.conf").joinpath("recipe").iterdir()]
    whole = complete([*common(folders), *arguments], recipes)
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        composed = compose("train", overrides=whole, return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        return stage_configs(composed)


def common(folders: Folders, steps: int = 1) -> list[str]:
    return [
        "model=custom",
        f"data.meta={folders.meta}",
        f"data.tile_size={tiny.TILE_SIZE}",
        "data.max_tokens=420",
        "data.max_pack_tiles=16",
        "data.num_workers=0",
        "data.packs_per_step=2",
        "stage.generation_tokens=3",
        "optim.lr=1e-2",
        "optim.warmup_steps=0",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.progress_bar=false",
        "callbacks.sample_cards=null",
        "callbacks.run_progress=null",
        f"trainer.max_steps={steps}",
    ]


class Stop(Callback):
    """Ends the process of a stage, as far as the stage can tell."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            raise KeyError("stopped")


def run_here(config: RunConfig, *, stop: int | None = None) -> Path:
    """A stage in this process: the folder that it leaves. With `stop` it ends behind this many steps."""
    folder = Path(config.run_dir) / config.stage.name
    callbacks = config.callbacks
    if stop is not None:
        callbacks = {**callbacks, "stop": {"_target_": f"{__name__}.Stop", "step": stop}}
    write_config(replace(config, callbacks=callbacks), folder)
    run_stage(folder)
    return folder


def stopped(config: RunConfig, step: int) -> Path:
    with pytest.raises(KeyError, match="stopped"):
        run_here(config, stop=step)
    return Path(config.run_dir) / config.stage.name


def going_on(folders: Folders, run: Path, donor: Path, *arguments: str, steps: int = 3) -> RunConfig:
    """Stage 1.5 of the base with a donor's tower, a checkpoint behind each step."""
    (config,) = settings_of(
        folders,
        f"model.path={folders.base}",
        "stages=[1.5]",
        f"scaling.donor={donor}",
        "scaling.entry=vit_incremental",
        "trainer.checkpoint_every_n_steps=1",
        f"trainer.max_steps={steps}",
        f"run_dir={run}",
        *arguments,
    ).values()
    return config


def wrecked(donor: Path) -> None:
    """Whoever reads its weights or its lineage now stumbles."""
    (donor / "model.safetensors").write_bytes(b"")
    (donor / "lineage.json").write_text("{")


def test_stopped_and_continued(folders: Folders, tmp_path: Path) -> None:
    """A checkpoint has the weights and what is to be recorded: of the donor nothing is read again, and the stage's
    weights and lineage.json end as those of a stage that was never stopped.
    """
    donor, run = with_lineage(folders, tmp_path / "donor"), tmp_path / "run"
    config = going_on(folders, run, donor)
    whole = run_here(config).rename(tmp_path / "whole")
    stopped(config, 2)
    wrecked(donor)
    stage = run_here(config)
    assert (stage / "lineage.json").read_text() == (whole / "lineage.json").read_text()
    assert (stage / "weights/lineage.json").read_text() == (whole / "lineage.json").read_text()
    lineage = recorded(stage)
    assert lineage.steps == 3
    assert lineage.tokens == tokens_in(whole)
    assert [origin.lineage and origin.lineage.tokens for origin in lineage.origins] == [None, 70]
    ours, wanted = (load_file(folder / "weights/model.safetensors") for folder in (stage, whole))
    assert same(ours, wanted)


def tokens_in(stage: Path) -> int:
    """Tokens of all datasets as the last step has logged them."""
    return int(sum(read_metrics(stage).last("data/tokens/").values()))


def test_stopped_and_continued_without_its_donor(folders: Folders, tmp_path: Path) -> None:
    """The folder is gone, and done.json says what the stage began with."""
    donor = tmp_path / "donor"
    shutil.copytree(folders.donor, donor)
    config = going_on(folders, tmp_path / "run", donor)
    whole = run_here(config).rename(tmp_path / "whole")
    stopped(config, 2)
    shutil.rmtree(donor)
    stage = run_here(config)
    done = [json.loads((folder / "done.json").read_text()) for folder in (stage, whole)]
    assert done[0]["input_weights"] == done[1]["input_weights"]
    assert done[0]["output_weights"] == done[1]["output_weights"]


def test_a_stage_that_was_begun_keeps_its_donor(folders: Folders, tmp_path: Path) -> None:
    """By its place: written in another way it is the same."""
    config = going_on(folders, tmp_path / "run", folders.donor)
    stopped(config, 1)
    with pytest.raises(DonorError) as caught:
        run_here(with_donor(config, folders.wide))
    message = f"the stage was begun with scaling.donor={folders.donor}, this command says {folders.wide}: "
    assert str(caught.value).startswith(message)
    stage = run_here(with_donor(config, folders.wide / "../donor"))
    assert recorded(stage).origins[-1].path == str(folders.donor)


def with_donor(config: RunConfig, donor: Path) -> RunConfig:
    """The settings that the same command with another donor gives."""
    callback = {**(config.callbacks["progressive_scaling"] or {}), "donor": str(donor)}
    scaling = replace(config.scaling, donor=str(donor))
    return replace(config, scaling=scaling, callbacks={**config.callbacks, "progressive_scaling": callback})


def test_adapters_beside_a_donor(folders: Folders, tmp_path: Path) -> None:
    """Stage 1 with LoRA on the language model: checkpoints leave out the frozen tower. Exported while under way it has
    the donor's; going on needs the donor once more; the folder of weights has it too, and a note says so.
    """
    donor, run = tmp_path / "donor", tmp_path / "run"
    shutil.copytree(folders.donor, donor)
    options = "stages=[1]", "scaling.entry=mlp_warmup", "lora=llm", "lora.rank=2"
    config = going_on(folders, run, donor, *options)
    whole = run_here(config).rename(tmp_path / "whole")
    stage = stopped(config, 2)
    exported(run, tmp_path / "under_way", checkpoint="newest")
    wanted = tensors_of(donor, TOWER, JOINT)
    assert same(tensors_of(tmp_path / "under_way", TOWER, JOINT), wanted)
    assert not same(tensors_of(tmp_path / "under_way", *LANGUAGE), tensors_of(folders.base, *LANGUAGE))
    donor.rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=f"scaling.donor={donor}: there is no such folder"):
        run_here(config)
    assert not (stage / "weights").exists()
    (tmp_path / "away").rename(donor)
    run_here(config)
    assert (stage / "lineage.json").read_text() == (whole / "lineage.json").read_text()
    assert same(tensors_of(stage / "weights", TOWER, JOINT), wanted)
    assert same(load_file(stage / "weights/model.safetensors"), load_file(whole / "weights/model.safetensors"))
    assert f"It came from {donor}" in (stage / "adapter/README.md").read_text()
    # Weights beside adapters are frozen; what the stage hands on is another language model, and no hash of it is taken.
    assert recorded(stage).trained == ["llm (LoRA)"]
    assert recorded(stage).parts["vision"].after == recorded(whole).parts["vision"].before


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra qlora")
def test_a_donor_beside_weights_of_4_bits(folders: Folders, tmp_path: Path) -> None:
    """The network is read a second time for the merged weights, and so is the donor."""
    options = "stages=[1]", "scaling.entry=mlp_warmup", "lora=llm", "lora.rank=2", "lora.quantize=nf4"
    stage = run_here(going_on(folders, tmp_path / "run", folders.donor, *options, steps=1))
    merged, own = (tensors_of(folder) for folder in (stage / "weights", folders.base))
    wanted = own | tensors_of(folders.donor, TOWER, JOINT)
    moved = {name for name, value in merged.items() if not torch.equal(value, wanted[name])}
    assert moved
    assert all(name.startswith(LANGUAGE) and name.endswith("proj.weight") for name in moved)


def test_new_parts_are_exported_as_they_are(folders: Folders, tmp_path: Path) -> None:
    """A language model of 436 tokens gets 9 rows and a new projector, which LoRA on it leaves frozen and checkpoints
    leave out: a checkpoint that is exported has those of the run.
    """
    llm = tmp_path / "llm"
    llm.mkdir()
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(originals.CHECKPOINTS / "qwen2_vit300m" / file, llm)
    (llm / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = load_tokenizer(llm)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], special_tokens=True)
    tokenizer.save_pretrained(llm)
    language = tiny_network(4).config.text_config
    language.vocab_size = len(tokenizer)
    Qwen2ForCausalLM(language).save_pretrained(llm)
    source = "model.path=null", f"model.language_model_path={llm}", "scaling.projector=new"
    options = "stages=[1]", "scaling.entry=mlp_warmup", "lora=llm", "lora.rank=2"
    stage = run_here(going_on(folders, tmp_path / "run", folders.donor, *source, *options))
    target = exported(tmp_path / "run", tmp_path / "exported", checkpoint="newest")
    assert len(tokenizer) == 436
    assert len(tensors_of(target)["lm_head.weight"]) == 445
    assert same(tensors_of(target), tensors_of(stage / "weights"))


def test_an_adapted_tower_has_no_hash_of_its_frozen_weights(folders: Folders, tmp_path: Path) -> None:
    """What is handed on has the adapters in it; they are no part of the tower's size either."""
    lora = LoraSettings(parts=["vision"], rank=2)
    for name, stage in (("lora", warmup(configured(folders), lora=lora)), ("plain", warmup(configured(folders)))):
        fit(folders, stage, tmp_path / name, ProgressiveScaling(str(folders.donor)))
    adapted, plain = (recorded(tmp_path / name) for name in ("lora", "plain"))
    assert adapted.trained == ["vision (LoRA)"]
    assert adapted.parts["vision"].before == plain.parts["vision"].before
    assert adapted.parts["vision"].after is None
    assert adapted.parts["vision"].parameters == plain.parts["vision"].parameters


def exported(run: Path, target: Path, **settings: Any) -> Path:
    export(ExportConfig(run=str(run), target=str(target), progress_bar=False, logits=False, **settings))
    return target


# -- donors that are refused ------------------------------------------------------------------------------------------


def other_tower(folder: Path, **vision: Any) -> Path:
    return save(tiny_network(6, vision={**tiny.tiny_config().vision, **vision}), folder)


def cut_short(folder: Path) -> Path:
    file = save(tiny_network(6), folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "there is no such folder"),
        (cut_short, "is damaged or cut short"),
        (lambda folder: other_tower(folder, image_size=16), "its tile size in pixels is 16, here it is 32"),
        (lambda folder: other_tower(folder, num_hidden_layers=3), "its number of layers is 3, here it is 2"),
        (
            lambda folder: other_tower(folder, use_qk_norm=True),
            "its norm of queries and keys is True, here it is False",
        ),
    ],
)
def test_a_wrong_donor_costs_nothing(
    folders: Folders, make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    """The stage ends with the message before it trains; it leaves no weights, no checkpoint and no record."""
    donor = make(tmp_path / "donor")
    with pytest.raises(ValueError, match=message) as caught:
        run_here(going_on(folders, tmp_path / "run", donor))
    assert f"scaling.donor={donor}" in str(caught.value)
    assert leavings(tmp_path / "run/vit_incremental") <= {"config.yaml", "csv", "environment.json", "ledger.jsonl"}


def leavings(stage: Path) -> set[str]:
    return {path.name for path in stage.iterdir()}


def test_the_process_of_a_stage_ends_with_the_message(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user's mistake: what is wrong, and where the traceback lies."""
    donor, stage = other_tower(tmp_path / "donor", num_attention_heads=4), tmp_path / "run/vit_incremental"
    write_config(going_on(folders, tmp_path / "run", donor), stage)
    monkeypatch.setattr(sys, "argv", ["stage", str(stage)])
    with pytest.raises(SystemExit) as ended:
        stage_command.main()
    message = f"error: scaling.donor={donor}: its vision tower does not fit this network: its number of heads is 4"
    assert str(ended.value).startswith(f"{message}, here it is 2 (num_attention_heads). Give a donor of this kind")
    assert "DonorError" in (stage / "error.log").read_text()


# -- a family ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grown:
    """A run of stages 1 and 2 by the real command: a language model alone, and a donor.

    Attributes:
        run: its folder.
        arguments: of the command, without the donor.
        output: of the command.
    """

    run: Path
    arguments: list[str]
    output: str

    def stage(self, name: str) -> Path:
        return self.run / name


@pytest.fixture(scope="module")
def grown(folders: Folders) -> Grown:
    run = folders.root / "grown"
    arguments = [f"model.language_model_path={folders.llm}", "stages=[1,2]", f"run_dir={run}"]
    result = train(*common(folders, steps=2), *arguments, f"scaling.donor={folders.donor}")
    assert result.returncode == 0, result.stderr[-3000:]
    return Grown(run, arguments, result.stdout)


def test_a_language_model_and_a_donor_are_a_whole_network(folders: Folders, grown: Grown) -> None:
    """After stage 1 tower and language model are those that were given; stage 2 begins with its weights alone."""
    first = tensors_of(grown.stage("mlp_warmup") / "weights")
    assert same({name: first[name] for name in first if name.startswith(TOWER)}, tensors_of(folders.donor, TOWER))
    language = load_file(folders.llm / "model.safetensors")
    native = {name.replace("model.", "model.language_model."): value for name, value in language.items()}
    assert same({name: first[name] for name in first if name.startswith(LANGUAGE)}, native)
    stages = [read_config(grown.stage(name)) for name in ("mlp_warmup", "instruction_tuning")]
    assert [config.scaling.donor for config in stages] == [str(folders.donor), None]
    assert stages[1].callbacks["progressive_scaling"]["donor"] is None
    done = [json.loads((grown.stage(config.stage.name) / "done.json").read_text()) for config in stages]
    assert done[1]["input_weights"] == done[0]["output_weights"]


def test_lineage_of_two_generations(folders: Folders, grown: Grown) -> None:
    """Steps and tokens are those of done.json and of the csv; each stage knows where it comes from, all the way."""
    first, second = grown.stage("mlp_warmup"), grown.stage("instruction_tuning")
    lineage = recorded(second)
    assert (lineage.stage, lineage.trained) == ("instruction_tuning", ["vision", "projector", "llm"])
    (origin,) = lineage.origins
    assert (origin.path, origin.brings, origin.donor) == (str(first / "weights"), ALL, False)
    assert origin.lineage == recorded(first) == recorded(first / "weights")
    assert [(one.path, one.brings, one.donor, one.lineage) for one in origin.lineage.origins] == [
        (str(folders.llm), ["llm"], False, None),
        (str(folders.donor), ["vision", "projector"], True, None),
    ]
    for folder in (first, second):
        found = recorded(folder)
        assert found.steps == json.loads((folder / "done.json").read_text())["steps"] == 2
        assert found.tokens == tokens_in(folder)
        assert found.folder == str(folder)
    tower = recorded(first).parts["vision"]
    assert tower.before == tower.after == lineage.parts["vision"].before != lineage.parts["vision"].after
    assert recorded(first).parts["projector"].after == lineage.parts["projector"].before
    assert tower_tokens(lineage) == tokens_in(second)


def test_a_run_and_its_export_are_donors(folders: Folders, grown: Grown, tmp_path: Path) -> None:
    """The tower of the stage that finished last, and its whole family, three generations deep."""
    target, last = exported(grown.run, tmp_path / "exported"), grown.stage("instruction_tuning")
    assert read_lineage(target) == recorded(last)
    for donor, folder in ((target, target), (grown.run, last / "weights")):
        stage = warmup(configured(folders))
        fit(folders, stage, tmp_path / donor.name, ProgressiveScaling(str(donor)))
        lineage = recorded(tmp_path / donor.name)
        assert same(part(stage.internvl, TOWER), tensors_of(last / "weights", TOWER))
        assert lineage.origins[-1].path == str(folder)
        assert lineage.parts["vision"].after == recorded(last).parts["vision"].after
        assert lineage.origins[-1].lineage == recorded(last)
        assert [one.stage for one in ancestors(lineage)] == ["mlp_warmup", "instruction_tuning"]
        assert tower_tokens(lineage) == tokens_in(last)


def test_a_finished_stage_was_finished_with_its_donor(folders: Folders, grown: Grown) -> None:
    """The same command skips both stages; what another donor holds would have made other weights."""
    configs = settings_of(folders, *grown.arguments, f"scaling.donor={folders.donor}", "trainer.max_steps=2")
    assert [result.stage for result in run_chain(configs)] == ["mlp_warmup", "instruction_tuning"]
    configs["mlp_warmup"] = with_donor(configs["mlp_warmup"], folders.wide)
    with pytest.raises(ConfigError, match="mlp_warmup was finished from other input weights than there are now"):
        run_chain(configs)


# -- which stage gets the tower ---------------------------------------------------------------------------------------


def names(folders: Folders, *arguments: str) -> list[str]:
    return list(settings_of(folders, *arguments))


def test_the_stage_of_entry_must_run_and_be_the_first_to_see_a_picture(folders: Folders) -> None:
    donor = "scaling.donor=/runs/small"
    result = train(*common(folders), "model.path=/base", "stages=[2]", donor)
    assert result.returncode == 1
    message = "error: scaling.donor=/runs/small gives its tower to stage scaling.entry=mlp_warmup, which is not among "
    assert result.stderr.startswith(message)
    with pytest.raises(ConfigError, match=r"entry=vit_incremental, which is not among stages=\['mlp_warmup'"):
        names(folders, donor, "stages=[1,2]", "scaling.entry=vit_incremental")
    with pytest.raises(ConfigError, match=r"entry=vit_incremental, but mlp_warmup would run before it for nothing"):
        names(folders, donor, "stages=[1,1.5]", "scaling.entry=vit_incremental")
    assert names(folders, donor, "stages=[1,1.5]") == ["mlp_warmup", "vit_incremental"]


@pytest.mark.parametrize(
    ("arguments", "entry"),
    [
        (["scaling.donor=/runs/small"], "mlp_warmup"),
        (["scaling.donor=/runs/small", "scaling.entry=vit_incremental"], "vit_incremental"),
        (["scaling.entry=vit_incremental"], "mlp_warmup"),
    ],
)
def test_a_donor_takes_the_place_of_stage_1_or_1_5(folders: Folders, arguments: list[str], entry: str) -> None:
    """The larger miniature runs stage 1.5 on request: as the stage of entry, and then without stage 1."""
    configs = settings_of(folders, "recipe=miniature_large", "model=miniature_large", "data.tile_size=64", *arguments)
    assert list(configs) == ["language_warmup", entry, "instruction_tuning"]
    given = "/runs/small" if "scaling.donor=/runs/small" in arguments else None
    assert [config.scaling.donor for config in configs.values()] == [None, given, None]


def test_a_language_model_alone_needs_a_tower(folders: Folders) -> None:
    configs = settings_of(folders, f"model.language_model_path={folders.llm}", "stages=[1]")
    with pytest.raises(ConfigError, match=r"has no vision tower beside it: give scaling.donor=RUN"):
        run_chain(configs)
