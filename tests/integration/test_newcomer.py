"""The README's five steps as a newcomer walks them: clone, ten rows of one's own, audit, training, chat, export.

Rows, meta.json and commands are read from the README, so it cannot say anything else than what is run here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from ivl_lightning.constants import TILE_SIZE
from ivl_lightning.models.loader import build_model
from tests import tiny
from tests.pages import ROOT, blocks, lines_of_commands

README = ROOT / "README.md"
SHORT = "trainer.accelerator=cpu trainer.max_steps=2 trainer.threads=1 data.num_workers=0 data.max_tokens=4096"
COLORS = ("red", "green", "blue", "yellow", "black")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone of the working tree would hold: all that git knows or would take; data and model beside it."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    told = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    folder = tmp_path / "clone"
    for name in dict.fromkeys(filter(None, told.stdout.decode().split("\0"))):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    write_data(tmp_path / "data")
    write_model(tmp_path / "model")
    return folder


def write_data(folder: Path) -> None:
    """Ten pictures, each with a row like the README's, and its meta.json."""
    row, meta = (json.loads(block.text) for block in blocks(README) if block.language == "json")
    (entry,) = meta.values()
    pictures = folder / entry["root"]
    pictures.mkdir(parents=True)
    rows = []
    for number in range(10):
        # The first row is the README's own.
        name, color = (row["image"] if number == 0 else f"{number}.jpg"), COLORS[number % 5]
        picture = Image.new("RGB", (600 if number == 1 else 300, 300), "white")
        ImageDraw.Draw(picture).ellipse((50, 50, 250, 250), fill=color)
        picture.save(pictures / name)
        human, answer = row["conversations"]
        turns = [human, answer if number == 0 else {**answer, "value": f"A {color} ball."}]
        rows.append({**row, "id": number + 1, "image": name, "conversations": turns})
    (folder / entry["annotation"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.json").write_text(json.dumps(meta))


def write_model(folder: Path) -> None:
    """A checkpoint as released ones are, tiles of 448 pixels included, of one layer each."""
    tokenizer = tiny.load_tiny_tokenizer()
    one = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    config = tiny.tiny_config(
        vision={**tiny.tiny_config().vision, **one, "image_size": TILE_SIZE, "patch_size": 14},
        language_model={**tiny.tiny_config().language_model, **one, "max_position_embeddings": 32768},
    )
    build_model(config, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def steps(folder: Path) -> list[str]:
    """The README's commands behind `make setup`, with folders that are there, for ten rows and an untrained model."""
    lines = lines_of_commands(README)
    own = lines[lines.index("make setup") + 1 :]
    places = {
        "/models/internvl": f"{folder}/model",
        "/data/": f"{folder}/data/",
        "data.val_rows=100": "data.val_rows=2",
    }
    for told, meant in places.items():
        assert any(told in line for line in own)
        own = [line.replace(told, meant) for line in own]
    return own


def in_processes(clone: Path, line: str) -> str:
    """Run a command as a shell does in the clone, with this environment's programs; standard output."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # In the place of `make setup`, which would fetch packages: the clone's code in this environment.
        "PYTHONPATH": str(clone),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        line, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{line}\n{result.stdout[-1500:]}\n{result.stderr[-3000:]}"
    return result.stdout


def in_this_process(clone: Path, line: str) -> str:
    """The same by the command's function, to save the time of imports; a stage has its own process all the same."""
    words = shlex.split(line)
    program = "train" if words[0] == "python" else words[0].removeprefix("ivl-")
    main = importlib.import_module(f"ivl_lightning.cli.{program}").main
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(clone)
        patch.setattr(sys, "argv", words[words[0] == "python" :])
        code = exit_code(main)
    assert not code, f"{line}: {code}"
    return out.getvalue()


def exit_code(main: Callable[[], None]) -> object:
    try:
        main()
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.parametrize("walk", [in_this_process, pytest.param(in_processes, marks=pytest.mark.soak)])
def test_five_steps(clone: Path, walk: Callable[[Path, str], str]) -> None:
    """Each command runs as it stands; what it leaves is looked at."""
    audit, train, chat, export = steps(clone.parent)

    walk(clone, audit)
    page = json.loads((clone / "audit/audit.json").read_text())
    assert page["rejected"] == []
    assert "cats" in (clone / "audit/audit.html").read_text()

    walk(clone, f"{train} {SHORT}")
    assert (clone / "runs/cats/report.html").is_file()
    done = json.loads((clone / "runs/cats/instruction_tuning/done.json").read_text())
    assert (done["steps"], done["rejected"]) == (2, {})
    assert done["settings"]["optim.lr"] == 1e-5

    assert walk(clone, f"{chat} max_new_tokens=4 device=cpu").strip()

    walk(clone, export)
    assert json.loads((clone / "cats/parity.json").read_text())["passed"]


def test_the_readme_has_five_steps() -> None:
    text = README.read_text(encoding="utf-8").partition("## Your own data in five steps")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d)\. \*\*", text, flags=re.MULTILINE) == list("12345")
