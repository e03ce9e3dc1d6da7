"""What a person gets who installs the wheel, and what the repository must not hold."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT_SUFFIXES = {"", ".cfg", ".in", ".ini", ".json", ".lock", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}

# In pieces, so that this file passes its own test.
INDEX_MARKS = (
    "py" + "pi.org",
    "py" + "pi.python.org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "ana" + "conda.org",
    "registry.npm" + "js.org",
    "index" + "-url",
    "index" + "_url",
    "find" + "-links",
    "find" + "_links",
)


def tracked_files() -> list[Path]:
    """Files of the repository, relative to its root; links are listed as links."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [Path(name) for name in listed.split("\0") if name]
    return [file for file in files if os.path.lexists(ROOT / file)]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "dist"
    for file in tracked_files():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, source / file, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_config(wheel_names: set[str]) -> None:
    configs = {f"ivl_lightning/{file.as_posix()}" for file in tracked_files() if file.parts[0] == "conf"}
    assert configs
    assert configs <= wheel_names


def test_the_wheel_holds_every_file_of_the_package(wheel_names: set[str]) -> None:
    files = {file for file in tracked_files() if file.parts[0] == "ivl_lightning" and not (ROOT / file).is_symlink()}
    callbacks = {f"ivl_lightning/{file.as_posix()}" for file in tracked_files() if file.parts[0] == "callbacks"}
    assert callbacks
    assert {file.as_posix() for file in files} | callbacks <= wheel_names


def test_the_wheel_holds_its_packages_and_nothing_of_the_tests(wheel_names: set[str]) -> None:
    """Hydra looks for launchers in a namespace of its own, in which other projects have packages too."""
    packages = {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name}
    assert packages == {"ivl_lightning", "hydra_plugins"}
    plugins = {name for name in wheel_names if name.startswith("hydra_plugins/")}
    assert plugins == {f"hydra_plugins/ivl_lightning/{name}.py" for name in ("__init__", "launcher")}
    assert not [name for name in wheel_names if "test" in Path(name).name]


def test_the_wheel_brings_the_license(wheel_names: set[str]) -> None:
    assert [name for name in wheel_names if name.endswith(".dist-info/licenses/LICENSE")]


def test_no_file_names_a_package_index() -> None:
    found = []
    for file in tracked_files():
        if (ROOT / file).is_symlink() or file.suffix not in TEXT_SUFFIXES or "fixtures" in file.parts:
            continue
        text = (ROOT / file).read_text(encoding="utf-8").lower()
        found += [f"{file}: {mark}" for mark in INDEX_MARKS if mark in text]
    assert not found


def test_init_files_are_empty() -> None:
    inits = [file for file in tracked_files() if file.name == "__init__.py"]
    assert inits
    assert not [file for file in inits if (ROOT / file).read_bytes()]


def test_links_are_relative_and_inside_the_repository() -> None:
    links = [file for file in tracked_files() if (ROOT / file).is_symlink()]
    assert {link.as_posix() for link in links} == {"ivl_lightning/callbacks", "ivl_lightning/conf"}
    for link in links:
        target = (ROOT / link).readlink()
        assert not target.is_absolute()
        assert (ROOT / link).resolve().is_relative_to(ROOT.resolve())
