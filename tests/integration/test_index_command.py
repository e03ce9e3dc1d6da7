"""`ivl-index` takes the arguments of `train.py`, and training finds what it made."""

import json
import subprocess
import sys

import pytest

from tests.commands import ROOT, environment, own_arguments, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model and data; the command, and the folder it works in."""
    folder = tmp_path_factory.mktemp("index")
    arguments = [
        *own_arguments(folder, steps=1),
        f"run_dir={folder}/run",
        "data.val_rows=4",
        f"data.cache_dir={folder}/index",
    ]

    def index(*more):
        command = [sys.executable, "-m", "ivl_lightning.cli.index", *arguments, *more]
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False
        )

    return folder, arguments, index


def test_training_finds_the_index(run):
    folder, arguments, index = run
    result = index()
    assert result.returncode == 0, result.stderr[-2000:]
    assert "pictures" in result.stdout
    made = {path: path.stat().st_mtime_ns for path in (folder / "index").glob("*.parquet")}
    assert len(made) == 2
    trained = train(*arguments)
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in (folder / "index").glob("*.parquet")} == made


def test_too_many_rejects_end_with_their_places(run):
    folder, _, index = run
    rows = (folder / "data/text.jsonl").read_text().splitlines()
    broken = folder / "data/broken.jsonl"
    broken.write_text("\n".join([*rows[:3], '{"id": 1', *rows[3:]]) + "\n")
    content = json.loads((folder / "data/meta.json").read_text())
    content["text"]["annotation"] = "broken.jsonl"
    (folder / "data/broken.json").write_text(json.dumps(content))
    result = index(f"data.meta={folder}/data/broken.json")
    assert result.returncode == 1
    assert "1 of 25 rows cannot be used" in result.stdout.replace("\n", " ")
    assert "json_invalid" in result.stdout
