"""The rooms' contracts hold, and each of them catches what it forbids: a rule that never fires protects nothing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package, its links and its settings, in a folder where imports may be planted."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("ivl_lightning", "conf", "callbacks"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A tool of this environment, run in `folder`."""
    tool = Path(sys.executable).with_name(command[0])
    return subprocess.run([str(tool), *command[1:]], cwd=folder, capture_output=True, text=True, check=False)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder, "lint-imports", "--no-cache", "--no-logo")


def broken(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Names of the contracts that were broken."""
    return re.findall(r"^(.+) BROKEN$", result.stdout, flags=re.MULTILINE)


def test_the_contracts_hold(copy: Path) -> None:
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("ivl_lightning/losses/planted.py", "import ivl_lightning.stages.root", "Upper rooms"),
        ("ivl_lightning/models/planted.py", "import ivl_lightning.losses.next_token", "Upper rooms"),
        ("ivl_lightning/data/planted.py", "import ivl_lightning.callbacks.packing_stats", "Upper rooms"),
        ("callbacks/planted.py", "import ivl_lightning.cli.train", "Upper rooms"),
        ("ivl_lightning/planted.py", "", "Upper rooms"),
        ("ivl_lightning/stages/planted.py", "from omegaconf import DictConfig", "Hydra and OmegaConf"),
        ("callbacks/planted.py", "import hydra", "Hydra and OmegaConf"),
        ("ivl_lightning/losses/planted.py", "import transformers", "Losses and optim"),
        ("ivl_lightning/optim/planted.py", "import lightning", "Losses and optim"),
    ],
)
def test_a_planted_import_is_caught(copy: Path, file: str, line: str, contract: str) -> None:
    (copy / file).write_text(f"{line}\n", encoding="utf-8")
    result = lint_imports(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert [name for name in broken(result) if name.startswith(contract)]
    assert "planted" in result.stdout


@pytest.mark.parametrize("line", ["import callbacks", "from callbacks import packing_stats", "import conf"])
def test_the_top_level_folders_are_not_imported(copy: Path, line: str) -> None:
    (copy / "ivl_lightning/data/planted.py").write_text(f'"""Planted."""\n\n{line}\n', encoding="utf-8")
    result = run(copy, "ruff", "check", "--no-cache", "--select", "TID251", "ivl_lightning/data/planted.py")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "TID251" in result.stdout
