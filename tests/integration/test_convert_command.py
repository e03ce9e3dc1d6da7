"""`ivl-convert` as its users meet it: processes, damaged files, full disks, kills; the target is whole or untouched."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ivl_lightning.checkpoints.source import CheckpointError
from ivl_lightning.checkpoints.writer import DiskError, check_space, replace_folder, written_aside
from ivl_lightning.cli import convert as command
from ivl_lightning.cli.convert import convert
from ivl_lightning.conversion.write import ParityError
from ivl_lightning.models.build import load_model
from ivl_lightning.models.checkpoint import open_checkpoint
from tests import originals
from tests.commands import ROOT, environment

QWEN2, INTERNLM2 = (originals.CHECKPOINTS / name for name in originals.GOLDEN)
OLD = {"config.json": b"{}", "notes.txt": b"years of work"}


class Outcome(NamedTuple):
    """How a process ended, and what it wrote."""

    code: int | None
    out: str
    err: str


def run(*arguments: str) -> Outcome:
    """The command as its users start it."""
    done = subprocess.run(
        [sys.executable, "-m", "ivl_lightning.cli.convert", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class Child:
    """The command in a process of its own that need not import everything anew.

    Args:
        folder: for what it prints.
        arguments: of the command.
        before: done in the process first.
    """

    def __init__(self, folder: Path, *arguments: str, before: Callable[[], None] = lambda: None) -> None:
        self._files = folder / "stdout", folder / "stderr"
        self._before = before
        self._arguments = ["progress_bar=false", "threads=1", *arguments]
        self.process = multiprocessing.get_context("fork").Process(target=self._run)
        self.process.start()

    def _run(self) -> None:
        for number, file in enumerate(self._files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.argv[1:] = self._arguments
        self._before()
        command.main()

    def wait(self) -> Outcome:
        self.process.join(60)
        return Outcome(self.process.exitcode, *(file.read_text() for file in self._files))


def run_child(folder: Path, *arguments: str, before: Callable[[], None] = lambda: None) -> Outcome:
    return Child(folder, *arguments, before=before).wait()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a golden checkpoint, to be damaged."""
    return originals.copy_golden("qwen2_vit300m", tmp_path / "source")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in some dozen files with an index."""
    convert(originals.settings(QWEN2, tmp_path / "sharded", layout="original", shard_gb=1e-4, logits=False))
    return tmp_path / "sharded"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """In a folder where nothing else lies."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work/target"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, and folders that are empty."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def write_old(target: Path) -> None:
    target.mkdir()
    for name, content in OLD.items():
        (target / name).write_bytes(content)


def refused(source: Path, target: Path, *, existing: bool = True, **changes: Any) -> str:
    """The message of a conversion that must fail, of a target that is to be replaced or not there; nothing changes."""
    if existing:
        write_old(target)
    before = contents(target.parent)
    with pytest.raises((ValueError, DiskError)) as caught:
        convert(originals.settings(source, target, overwrite=existing, **changes))
    assert contents(target.parent) == before
    return str(caught.value)


def says(message: str, *words: object) -> None:
    """All words stand in the message."""
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


# -- processes ----------------------------------------------------------------------------------------------------


def test_a_good_run(tmp_path: Path):
    """Exit code 0; the table says what was compared, and parity.json the same."""
    target = tmp_path / "target"
    outcome = run(f"source={QWEN2}", f"target={target}", "threads=1")
    assert outcome.code == 0, outcome.err
    says(outcome.out, "103 tensors, bit for bit", "logits, image", "image features", "logits, text", "token ids of 4")
    assert outcome.out.count("equal") >= 5
    by = "source by reference code on the original's tensors, target by transformers"
    says(" ".join(outcome.out.split()), f"written: {target}", by)
    assert "Traceback" not in outcome.err
    report = json.loads((target / "parity.json").read_text())
    assert report["passed"]
    assert report["tensors"] == 103
    assert [entry["probe"] for entry in report["logits"]] == ["image", "text"]
    assert report["target"] == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_setting_that_is_none():
    """Exit code 2, before anything is imported."""
    outcome = run("source=a", "target=b", "layuot=hf", "bound=-1")
    assert outcome.code == 2
    says(outcome.err, "error: ", "layuot")
    assert "Traceback" not in outcome.err


def test_source_and_target_that_differ(target: Path):
    """Exit code 3: no two ways of computing agree to 1e-12. The report stays beside where the target would be."""
    kept = target.with_name("target.parity.json")
    outcome = run_child(target.parent.parent, f"source={QWEN2}", f"target={target}", "bound=1e-12")
    assert outcome.code == 3
    says(outcome.err, "DIFFERS", "error: nothing was written, because logits on the image document differ", kept)
    assert "written:" not in outcome.out
    assert [path.name for path in target.parent.iterdir()] == [kept.name]
    report = json.loads(kept.read_text())
    assert not report["passed"]
    assert report["bound"] == 1e-12
    assert report["target"] == str(target)


def test_a_success_takes_the_report_of_a_failure_away(target: Path):
    """Else a report that says `passed: false` lies beside a target that is whole."""
    with pytest.raises(ParityError):
        convert(originals.settings(QWEN2, target, bound=1e-12))
    assert target.with_name("target.parity.json").exists()
    convert(originals.settings(QWEN2, target))
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_mistake_in_the_files(source: Path, target: Path):
    """Exit code 2 and one line."""
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    outcome = run_child(target.parent.parent, f"source={source}", f"target={target}")
    assert outcome.code == 2
    says(outcome.err, f"error: {source / 'model.safetensors'} is damaged or cut short", "fetch it again")
    assert "Traceback" not in outcome.err
    assert not list(target.parent.iterdir())


def small_files() -> None:
    """No file of this process may become larger than 200 kB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_is_full(existing, target: Path):
    """Exit code 2; the file is named, and what to do; the old content stays."""
    if existing:
        write_old(target)
    outcome = run_child(
        target.parent.parent, f"source={QWEN2}", f"target={target}", f"overwrite={existing}", before=small_files
    )
    assert outcome.code == 2
    says(outcome.err, "error: ", "model.safetensors cannot be written", "make room, or choose another folder")
    assert "Traceback" not in outcome.err
    assert contents(target.parent) == ({f"target/{name}": value for name, value in OLD.items()} if existing else {})


def no_files_at_all() -> None:
    """Small enough for no companion file, after weights that fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))


def test_a_disk_that_is_full_behind_the_weights(target: Path, tmp_path: Path):
    """Shards of 60 kB at most are written, config.json is not: a name of 80 kB makes it too large."""
    config = originals.family_config("qwen2_300m", _name_or_path="x" * 80_000)
    config["llm_config"]["hidden_size"] = 24
    tensors = originals.random_tensors(originals.shapes(config))
    folder = originals.write_folder(tmp_path / "source", config, tensors, "qwen2_vit300m")
    assert max(value.nbytes for value in tensors.values()) < 60_000
    arguments = (f"source={folder}", f"target={target}", "layout=original", "shard_gb=6e-5")
    outcome = run_child(tmp_path, *arguments, before=no_files_at_all)
    assert outcome.code == 2, outcome.err
    says(outcome.err, f"error: {target} cannot be written", "File too large", "make room")
    assert not list(target.parent.iterdir())


def wait_for(partial: Path, file: str, child: Child) -> None:
    """Until a file of this name is being written, or the process has ended."""
    deadline = time.monotonic() + 60
    while not list(partial.glob(file)) and child.process.is_alive():
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("moment", "existing"), [("model-00003-*", False), ("model-00003-*", True), ("config.json", True)]
)
def test_a_kill_in_the_middle(moment, existing, target: Path, tmp_path: Path):
    """Neither while weights are written nor while they are compared is there a target; the next run takes no harm."""
    if existing:
        write_old(target)
    partial = target.with_name(".target.partial")
    arguments = (f"source={QWEN2}", f"target={target}", "shard_gb=1e-5", f"overwrite={existing}")
    for _ in range(20):
        child = Child(tmp_path, *arguments)
        wait_for(partial, moment, child)
        os.kill(child.process.pid or 0, signal.SIGKILL)
        code = child.wait().code
        if code != 0:
            break
        # Done already: a machine so busy that this process slept through it.
        shutil.rmtree(target)
        if existing:
            write_old(target)
    assert code == -signal.SIGKILL
    assert partial.exists()
    assert (contents(target) == OLD) if existing else not target.exists()
    convert(originals.settings(QWEN2, target, overwrite=existing))
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert "notes.txt" not in contents(target)
    load_model(target)


def heed_interruptions() -> None:
    """Shells start what runs in the background with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interruption(target: Path, tmp_path: Path):
    """Ctrl-C: exit code 130, and nothing is left; torch makes an error of its own of one that hits it in a read."""
    for _ in range(20):
        child = Child(tmp_path, f"source={QWEN2}", f"target={target}", "shard_gb=1e-5", before=heed_interruptions)
        wait_for(target.with_name(".target.partial"), "model-00003-*", child)
        os.kill(child.process.pid or 0, signal.SIGINT)
        outcome = child.wait()
        if outcome.code:
            break
        shutil.rmtree(target)
    assert outcome.code in (130, 2)
    assert "Traceback" not in outcome.err
    if outcome.code == 130:
        says(outcome.err, "interrupted: nothing was written")
    assert not list(target.parent.iterdir())


# -- weights that are damaged or something else -------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_that_was_cut_short(existing: bool, source: Path, target: Path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    says(refused(source, target, existing=existing), file, "is damaged or cut short", "fetch it again")


@pytest.mark.parametrize("left", [0, 5, 500_000])
def test_a_shard_that_was_cut_short(left: int, sharded: Path, target: Path):
    file = max(sharded.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: min(left, file.stat().st_size - 1)])
    says(refused(sharded, target), file, "is damaged or cut short", "fetch it again")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs(file: str, source: Path, target: Path):
    """What stands in a clone without its large files: not damaged by code, but not the file."""
    (source / "model.safetensors").unlink()
    (source / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1021984\n")
    says(refused(source, target), source / file, "damaged or cut short", "fetch it again")


def test_a_shard_that_is_missing(sharded: Path, target: Path):
    files = sorted(sharded.glob("*.safetensors"))[1:3]
    for file in files:
        file.unlink()
    says(refused(sharded, target), "model.safetensors.index.json", *(file.name for file in files), "Fetch them")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda places: places.update({"mlp1.9.weight": "model-00001"}), ["does not hold mlp1.9.weight", "index"]),
        (lambda places: places.pop("mlp1.0.weight"), ["holds mlp1.0.weight", "against what its index says"]),
        (lambda places: places.update({"mlp1.0.weight": "model-00001"}), ["mlp1.0.weight", "against what its index"]),
    ],
)
def test_an_index_that_says_something_else(edit, words, sharded: Path, target: Path):
    """A tensor more, one less, or one in another file than it lies in."""
    first = min(path.name for path in sharded.glob("*.safetensors"))
    edit_json(sharded / INDEX, lambda content: edit(content["weight_map"]))
    edit_json(
        sharded / INDEX,
        lambda content: content.update(
            weight_map={key: first if place == "model-00001" else place for key, place in content["weight_map"].items()}
        ),
    )
    says(refused(sharded, target), str(sharded), ".safetensors", *words, "fetch")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "{absolute}", "below/secret.safetensors"])
def test_an_index_that_leads_out_of_its_folder(outside: str, sharded: Path, target: Path):
    """Nothing there is opened, though it is there."""
    secret = sharded.parent / "secret.safetensors"
    place = outside.format(absolute=secret)
    (sharded / "below").mkdir()
    for file in (secret, sharded / "below/secret.safetensors"):
        save_file({"mlp1.0.weight": torch.zeros(256)}, file)
    edit_json(sharded / INDEX, lambda content: content["weight_map"].update({"mlp1.0.weight": place}))
    says(refused(sharded, target), sharded / INDEX, "outside of its folder", place, "Do not use this checkpoint")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not valid JSON"]),
        ("[]", ["JSON object"]),
        ("{}", ["no weight_map"]),
        ('{"weight_map": 3}', ["weight_map"]),
    ],
)
def test_an_index_that_is_none(text: str, words, sharded: Path, target: Path):
    (sharded / INDEX).write_text(text)
    says(refused(sharded, target), sharded / INDEX, *words, "fetch it again")


def test_shards_without_their_index(sharded: Path, target: Path):
    (sharded / INDEX).unlink()
    says(refused(sharded, target), sharded, INDEX, "fetch it too")


def test_a_folder_without_weights(source: Path, target: Path):
    (source / "model.safetensors").unlink()
    says(refused(source, target), source, "holds no weights", "model.safetensors", "pytorch_model.bin")


QKV = "vision_model.encoder.layers.1.attn.qkv.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop("mlp1.1.bias"), ["config.json", "multi_modal_projector.linear_1.bias", "Fetch"]),
        (lambda tensors: tensors.pop(QKV), ["layer.1.attention.q_proj", "layer.1.attention.k_proj"]),
        (
            lambda tensors: tensors.update({"vision_model.head.weight": torch.zeros(3)}),
            ["model.safetensors", "vision_model.head.weight", "Correct config.json"],
        ),
        (
            lambda tensors: tensors.update({"language_model.model.norm.bias": torch.zeros(48)}),
            ["model.safetensors", "norm.bias", "no part of the model"],
        ),
        (
            lambda tensors: tensors.update({"mlp1.3.weight": torch.zeros(48, 47)}),
            ["model.safetensors", "linear_2.weight", "(48, 47)", "(48, 48)", "config.json"],
        ),
        (
            lambda tensors: tensors.update({QKV: torch.zeros(193, 64)}),
            ["model.safetensors", QKV, "193 rows are not 3 equal blocks"],
        ),
        (
            lambda tensors: tensors.update({"mlp1.0.weight": torch.zeros(256, dtype=torch.uint16)}),
            ["model.safetensors", "mlp1.0.weight", "U16"],
        ),
    ],
)
def test_tensors_that_are_not_the_models(edit, words, source: Path, target: Path):
    """Missing, fused and missing, surplus, surplus below a known name, of another shape, not to be divided, a type."""
    edit_tensors(source, edit)
    says(refused(source, target), source, *words)


class Bomb:
    """Whoever unpickles this runs code."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["weights", "projector", "adapter"])
def test_code_in_a_torch_file_is_not_run(kind, zipped, source: Path, target: Path, tmp_path: Path):
    """The file is refused, in either of torch's formats."""
    marker = tmp_path / "code-ran"
    file = {"weights": source / "pytorch_model.bin", "projector": tmp_path / "mlp1.pth"}.get(
        kind, tmp_path / "adapter/adapter_model.bin"
    )
    file.parent.mkdir(exist_ok=True)
    content = {**load_file(source / "model.safetensors"), "extra": Bomb(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    if kind == "projector":
        with pytest.raises(CheckpointError) as caught:
            load_model(source, projector=file)
        message = str(caught.value)
    else:
        (source / "model.safetensors").unlink()
        if kind == "adapter":
            shutil.copy(QWEN2 / "model.safetensors", source)
            settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(source)}
            (file.parent / "adapter_config.json").write_text(json.dumps(settings))
        message = refused(source if kind == "weights" else file.parent, target)
    says(message, file, "could run code", "safetensors")
    assert not marker.exists()


def test_nobody_is_advised_to_run_code(source: Path, target: Path, tmp_path: Path):
    """torch's own message says how to read such a file all the same, and that this will likely succeed."""
    (source / "model.safetensors").unlink()
    torch.save({"mlp1.0.weight": Bomb(tmp_path / "code-ran")}, source / "pytorch_model.bin")
    message = refused(source, target)
    assert "likely succeed" not in message
    assert "weights_only" not in message


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_of_plain_tensors(zipped: bool, source: Path, target: Path):
    """As of releases before safetensors; the target has safetensors."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert not convert(originals.settings(source, target, layout="original")).faults
    written = load_file(target / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in tensors.items())


def test_torch_files_with_an_index(source: Path, target: Path):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    halves = {"pytorch_model-1.bin": list(tensors)[::2], "pytorch_model-2.bin": list(tensors)[1::2]}
    for file, names in halves.items():
        torch.save({name: tensors[name] for name in names}, source / file)
    places = {name: file for file, names in halves.items() for name in names}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert not convert(originals.settings(source, target)).faults


@pytest.mark.parametrize("left", [0, 100, 100_000])
def test_a_torch_file_that_was_cut_short(left: int, source: Path, target: Path):
    file = source / "pytorch_model.bin"
    torch.save(load_file(source / "model.safetensors"), file)
    (source / "model.safetensors").unlink()
    file.write_bytes(file.read_bytes()[:left])
    says(refused(source, target), file, "damaged or cut short", "fetch it again")


def test_a_file_of_links(source: Path, target: Path, tmp_path: Path):
    """The hub's cache: names are links to files that lie elsewhere."""
    blob = tmp_path / "blobs/0123"
    blob.parent.mkdir()
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(blob)
    assert not convert(originals.settings(source, target)).faults


# -- configurations and tokenizers --------------------------------------------------------------------------------


def test_a_tile_size_that_the_positions_do_not_have(source: Path, target: Path):
    """`force_image_size` 84 with a table for 56 pixels: the original resizes the table whenever it is used."""
    originals.change_config(source, force_image_size=84)
    report = convert(originals.settings(source, target))
    assert not report.faults
    assert report.logits[0].tokens > 9  # 84 / 14 / 2 = 3 tokens a side


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llm_config": {"num_key_value_heads": 3}}, ["wqkv", "80 rows", "num_key_value_heads"]),
        ({"llm_config": {"num_key_value_heads": 1}}, ["self_attn.q_proj.weight", "(60, 48)", "(48, 48)"]),
        ({"llm_config": {"num_key_value_heads": 0}}, ["config.json", "num_key_value_heads"]),
        ({"llm_config": {"num_attention_heads": 5}}, ["config.json", "hidden size (48)", "attention heads (5)"]),
        ({"llm_config": {"hidden_size": 60}}, ["config.json", "(48, 48)", "(60, 60)"]),
        ({"llm_config": {"vocab_size": 417}}, ["(416, 48)", "(417, 48)"]),
        ({"llm_config": {"num_hidden_layers": 2}}, ["model.safetensors", "layers.2."]),
        ({"llm_config": {"num_hidden_layers": 4}}, ["layers.3."]),
        ({"llm_config": {"bias": True}}, ["self_attn.q_proj.bias"]),
        ({"llm_config": {"architectures": ["ParrotForCausalLM"]}}, ["'ParrotForCausalLM'", "supported are"]),
        ({"llm_config": {"hidden_act": "swishish"}}, ["config.json", "hidden_act"]),
        ({"llm_config": {"rope_scaling": {"type": "wobbly", "factor": 2.0}}}, ["config.json", "wobbly"]),
        ({"llm_config": {"vocab_size": None}}, ["does not give vocab_size"]),
        ({"vision_config": {"hidden_size": 68}}, ["config.json", "(256,)", "(272,)"]),
        ({"vision_config": {"num_attention_heads": 5}}, ["config.json", "num_attention_heads"]),
        ({"vision_config": {"norm_type": "group_norm"}}, ["norm_type='group_norm'", "layer_norm, rms_norm"]),
        ({"vision_config": {"qk_normalization": True}}, ["attention.q_norm.weight"]),
        ({"vision_config": {"hidden_act": "swishish"}}, ["config.json", "hidden_act"]),
        ({"downsample_ratio": 0.25}, ["(256,)", "(1024,)"]),
        ({"ps_version": "v3"}, ["ps_version='v3'", "v1, v2"]),
        ({"template": "parrot"}, ["config.json", "'parrot'", "internvl2_5"]),
        ({"model_type": "llava"}, ["model_type is 'llava'", "internvl_chat"]),
        ({"select_layer": 7}, ["config.json", "select_layer"]),
    ],
)
def test_a_config_that_is_wrong(changes, words, target: Path, tmp_path: Path):
    """File and field or tensor are named, whoever found it."""
    source = originals.copy_golden("internlm2_vit300m", tmp_path / "source", **changes)
    says(refused(source, target), source, *words)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("llm_config", "hidden_size", None),
        ("llm_config", "num_attention_heads", "six"),
        ("llm_config", "intermediate_size", -1),
        ("llm_config", "vocab_size", 0),
        ("llm_config", "rms_norm_eps", None),
        ("llm_config", "rope_scaling", []),
        ("llm_config", "hidden_act", ["silu"]),
        ("vision_config", "image_size", "large"),
        ("vision_config", "num_channels", -1),
        ("vision_config", "intermediate_size", -1),
        (None, "select_layer", []),
        (None, "template", ["internvl2_5"]),
        (None, "force_image_size", "large"),
        (None, "downsample_ratio", 0),
    ],
)
def test_a_value_that_makes_no_sense_is_a_mistake_in_the_file(section, field, value, source: Path, target: Path):
    """Whatever it is: the file is named, and no error of Python's or the library's own gets out."""
    config = originals.read_config(source)
    (config[section] if section else config)[field] = value
    (source / "config.json").write_text(json.dumps(config))
    says(refused(source, target), source / "config.json")


@pytest.mark.parametrize("section", ["llm_config", "vision_config"])
def test_a_config_without_a_section(section: str, source: Path, target: Path):
    edit_json(source / "config.json", lambda content: content.pop(section))
    says(refused(source, target), source / "config.json", f"has no {section}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["there is no config.json"]),
        ("{", ["not valid JSON"]),
        ("3", ["JSON object"]),
        ("{}", ["model_type is None"]),
    ],
)
def test_a_config_that_is_none(text: str | None, words, source: Path, target: Path):
    (source / "config.json").unlink() if text is None else (source / "config.json").write_text(text)
    says(refused(source, target), source, *words)


def test_a_source_that_is_not_there(tmp_path: Path, target: Path):
    says(refused(tmp_path / "nowhere", target, existing=False), tmp_path / "nowhere", "no such folder")


def without_special_tokens(folder: Path) -> None:
    """The tokenizer of the language model as it was before the nine tokens were added."""
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "a", "pad_token": "a", "unk_token": "a"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_without_the_special_tokens(source: Path, target: Path):
    """The folder is named."""
    without_special_tokens(source)
    says(refused(source, target), source, "<IMG_CONTEXT>")


@pytest.mark.parametrize(
    ("golden", "file"),
    [
        ("qwen2_vit300m", "vocab.json"),
        ("qwen2_vit300m", "merges.txt"),
        ("qwen2_vit300m", "tokenizer_config.json"),
        ("internlm2_vit300m", "tokenizer.model"),
    ],
)
def test_a_tokenizer_file_that_is_damaged(golden: str, file: str, target: Path, tmp_path: Path):
    """Cut in the middle of a line."""
    source = originals.copy_golden(golden, tmp_path / "source")
    content = (source / file).read_bytes()
    (source / file).write_bytes(content[: len(content) // 2] + b"\xff")
    says(refused(source, target), source)


def test_a_tokenizer_json_that_is_damaged(target: Path, tmp_path: Path):
    convert(originals.settings(QWEN2, tmp_path / "hf", logits=False))
    (tmp_path / "hf/tokenizer.json").write_text((tmp_path / "hf/tokenizer.json").read_text()[:5000])
    says(refused(tmp_path / "hf", target), tmp_path / "hf")


@pytest.mark.parametrize(("layout", "existing"), [("hf", False), ("hf", True), ("original", False)])
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(layout, existing, source: Path, target: Path):
    """Ids 430 to 444 would be looked up behind the last row; it is found when the weights are written already."""

    def cut(tensors: dict[str, Tensor]) -> None:
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            tensors[name] = tensors[name][:430].clone()

    edit_tensors(source, cut)
    originals.change_config(source, llm_config={"vocab_size": 430})
    says(refused(source, target, existing=existing, layout=layout), "tokenizer", "430")


def test_generation_settings_that_are_damaged(source: Path, target: Path):
    (source / "generation_config.json").write_text("{")
    says(refused(source, target), source / "generation_config.json")


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_a_source_without_a_tokenizer(layout: str, target: Path, tmp_path: Path):
    """Weights can be converted without one, and are compared; the report says that it is missing."""
    source = originals.write_family(tmp_path / "source", "llama_6b", tokenizer=False)
    report = convert(originals.settings(source, target, layout=layout))
    assert not report.faults
    assert [entry.probe for entry in report.logits] == ["image", "text"]
    assert any("no tokenizer" in note for note in report.notes)


def test_settings_of_tiles_that_the_config_leaves_out(target: Path, source: Path):
    """Class `InternVLChatConfig` cuts no picture into tiles where the file does not say so: one tile a picture."""
    gone = ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch")
    originals.change_config(source, **dict.fromkeys(gone))
    convert(originals.settings(source, target, logits=False))
    processor = json.loads((target / "preprocessor_config.json").read_text())
    assert (processor["min_patches"], processor["max_patches"]) == (1, 1)


# -- code that lies beside the weights ----------------------------------------------------------------------------

CODE = ("configuration_internvl_chat.py", "modeling_internvl_chat.py", "tokenization_internlm2.py")
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
}


def write_code(source: Path, marker: Path) -> None:
    """Whoever imports one of these makes a folder."""
    for name in CODE:
        (source / name).write_text(
            f"# ünïcode, \r\nimport os\nos.makedirs({str(marker)!r}, exist_ok=True)\n", newline=""
        )
    originals.change_config(source, auto_map={})
    edit_json(source / "config.json", lambda content: content.update(auto_map=AUTO_MAP))
    mapped = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    edit_json(source / "tokenizer_config.json", lambda content: content.update(auto_map=mapped))


@pytest.mark.parametrize("name", originals.GOLDEN)
def test_code_is_copied_and_not_run(name: str, target: Path, tmp_path: Path):
    """Byte for byte into the original's layout, with what refers to it; transformers' layout has no use for it."""
    source, marker = originals.copy_golden(name, tmp_path / "source"), tmp_path / "code-ran"
    write_code(source, marker)
    report = convert(originals.settings(source, target, layout="original"))
    assert not report.notes
    assert all((target / file).read_bytes() == (source / file).read_bytes() for file in CODE)
    assert originals.read_config(target)["auto_map"] == AUTO_MAP
    assert (target / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    convert(originals.settings(source, target.with_name("hf")))
    assert not list(target.with_name("hf").glob("*.py"))
    assert "auto_map" not in originals.read_config(target.with_name("hf"))
    assert "auto_map" not in json.loads((target.with_name("hf") / "tokenizer_config.json").read_text())
    assert not marker.exists()


def test_code_that_is_absent_is_noted(target: Path):
    """Without it the original's layout cannot be used by `trust_remote_code`."""
    report = convert(originals.settings(QWEN2, target, layout="original"))
    assert any("no modeling code (*.py)" in note for note in report.notes)
    assert json.loads((target / "parity.json").read_text())["notes"] == report.notes
    convert(originals.settings(QWEN2, target.with_name("hf"), logits=False))
    back = convert(originals.settings(target.with_name("hf"), target.with_name("back"), layout="original"))
    assert any("modeling code (*.py)" in note for note in back.notes)


# -- the target ---------------------------------------------------------------------------------------------------


def test_a_target_that_exists_is_kept(target: Path):
    write_old(target)
    with pytest.raises(ValueError, match=r"target exists: give another folder, or overwrite=true to replace it"):
        convert(originals.settings(QWEN2, target))
    assert contents(target.parent) == {f"target/{name}": value for name, value in OLD.items()}


def test_a_target_that_is_empty_is_used(target: Path):
    target.mkdir()
    convert(originals.settings(QWEN2, target, logits=False))
    assert (target / "config.json").is_file()


def test_a_target_in_folders_that_do_not_exist(target: Path):
    convert(originals.settings(QWEN2, target / "a/b", logits=False))
    assert (target / "a/b/config.json").is_file()


def test_overwriting_replaces_the_whole_folder(target: Path):
    write_old(target)
    convert(originals.settings(QWEN2, target, overwrite=True))
    assert "notes.txt" not in contents(target)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_overwriting_what_is_no_folder_of_its_own(kind: str, target: Path, tmp_path: Path):
    """A file gives its name away; a link stays, and the checkpoint it leads to is replaced where it lies."""
    if kind == "file":
        target.write_text("a file")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/config.json").write_text("{}")
        target.symlink_to(tmp_path / "elsewhere")
    convert(originals.settings(QWEN2, target, overwrite=True))
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert (target / "model.safetensors").is_file()
    if kind == "link":
        assert target.is_symlink()
        assert (tmp_path / "elsewhere/model.safetensors").is_file()


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(target: Path):
    """`overwrite=true` with a home folder for a target: nothing in it is touched."""
    (target / "docs").mkdir(parents=True)
    (target / "docs/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"target is no folder of a checkpoint .* is not replaced"):
        convert(originals.settings(QWEN2, target, overwrite=True))
    assert contents(target) == {"docs/thesis.txt": b"years of work"}


@pytest.mark.parametrize("written", ["{source}", "{source}/../source", "{link}"])
def test_the_source_is_never_the_target(written: str, source: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(source)
    before = contents(source)
    target = Path(written.format(source=source, link=link))
    with pytest.raises(ValueError, match="is the folder that is read: give another one"):
        convert(originals.settings(source, target, overwrite=True))
    assert contents(source) == before


def test_the_source_is_never_inside_the_target(tmp_path: Path):
    """Replacing `models` by the converted `models/source` would take the source away with it, and all its neighbors."""
    models = tmp_path / "models"
    source = originals.copy_golden("qwen2_vit300m", models / "source")
    originals.copy_golden("internlm2_vit300m", models / "another")
    before = contents(models)
    with pytest.raises(ValueError, match="source"):
        convert(originals.settings(source, models, overwrite=True))
    assert contents(models) == before


@pytest.mark.parametrize("named", ["base", "link"])
def test_an_adapters_base_is_never_the_target(named: str, tmp_path: Path):
    """It is read too, and other adapters belong to it; the adapter may know it by a link."""
    (tmp_path / "link").symlink_to(tmp_path / "base")
    base = tmp_path / "base"
    convert(originals.settings(QWEN2, base, logits=False))
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(tmp_path / named)}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    layer = "base_model.model.model.language_model.layers.0.mlp.up_proj"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 48), f"{layer}.lora_B.weight": torch.ones(112, 2)}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    before = contents(base)
    with pytest.raises(ValueError, match="base"):
        convert(originals.settings(tmp_path / "adapter", base, overwrite=True))
    assert contents(base) == before


def test_a_target_below_a_file(tmp_path: Path):
    """No traceback, but the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises((ValueError, DiskError), match=str(tmp_path / "file/target")):
        convert(originals.settings(QWEN2, tmp_path / "file/target"))


@pytest.mark.parametrize("written", [".", "..", "/"])
def test_a_target_without_a_name_of_its_own(written: str, tmp_path: Path, monkeypatch):
    """Nothing can take its name; the setting is named."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=f"target={written}"):
        convert(originals.settings(QWEN2, Path(written)))
    assert not list((tmp_path / "here").iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written():
    """The file system of /proc has no byte free."""
    with pytest.raises(DiskError, match=r"/proc/target needs 0\.00 GB, but its disk has 0\.00 GB free: make room, or"):
        convert(originals.settings(QWEN2, Path("/proc/target")))


def test_space_is_asked_of_the_nearest_folder(tmp_path: Path):
    check_space(tmp_path / "not/yet/there", 1000)
    with pytest.raises(DiskError, match=r"not/yet/there needs 1,000,000,000\.00 GB, but its disk has [\d,.]+ GB free"):
        check_space(tmp_path / "not/yet/there", 10**18)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_what_goes_wrong_while_writing_aside(number: int, target: Path):
    """A full disk or quota is named as such; whatever it was, the folder aside is gone and the target as it was."""
    write_old(target)

    def fail(error: BaseException) -> None:
        with written_aside(target, overwrite=True) as aside:
            (aside / "half").write_text("")
            raise error

    with pytest.raises(DiskError, match=r"target cannot be written \(.*\): make room"):
        fail(OSError(number, os.strerror(number)))
    for error in (KeyError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert contents(target.parent) == {f"target/{name}": value for name, value in OLD.items()}


def test_a_folder_that_cannot_take_the_name_leaves_the_old_one(target: Path):
    """The last step fails: what was there must stand under its name again."""
    write_old(target)
    with pytest.raises(OSError, match="nowhere"):
        replace_folder(target.with_name("nowhere"), target)
    assert contents(target.parent) == {f"target/{name}": value for name, value in OLD.items()}


def test_files_can_be_read_by_others(target: Path):
    """Weights too: safetensors' own files are their owner's alone."""
    convert(originals.settings(QWEN2, target, logits=False))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in target.iterdir())


def test_a_converted_folder_can_be_converted_again(target: Path):
    """hf to hf: the same files but for the report, which names other folders."""
    convert(originals.settings(QWEN2, target, logits=False))
    again = target.with_name("again")
    assert not convert(originals.settings(target, again)).faults
    here, there = contents(target), contents(again)
    assert here.keys() == there.keys()
    assert {name for name in here if here[name] != there[name]} == {"parity.json"}
    assert open_checkpoint(again).config.to_dict() == open_checkpoint(target).config.to_dict()
