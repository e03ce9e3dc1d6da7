"""lineage.json: what is written is read again, wrong files are named, and the family is walked oldest first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ivl_lightning.checkpoints.lineage import (
    LINEAGE_NAME,
    Lineage,
    Origin,
    PartRecord,
    ancestors,
    has_trained_tower,
    read_lineage,
    tower_tokens,
    write_lineage,
)
from ivl_lightning.checkpoints.source import CheckpointError

ALL = ("vision", "projector", "llm")


def stage(folder: str, *origins: Origin, trained: tuple[str, ...] = ("llm",), tokens: int | None = 10) -> Lineage:
    name = Path(folder).name
    return Lineage(
        name, folder, list(trained), 3, tokens, {"vision": PartRecord(7, None, f"hash of {name}")}, [*origins]
    )


def of(lineage: Lineage, *brings: str, donor: bool = False) -> Origin:
    return Origin(f"{lineage.folder}/weights", list(brings or ALL), donor, lineage)


RELEASED = Origin("/models/tower", ["vision"], False, None)


@pytest.fixture
def carried() -> Lineage:
    """Tower of `tower` (which began as `first`), language model of `large`: `first`, `tower` -> carried <- `large`."""
    first = stage("/run/first", trained=("llm",), tokens=1)
    tower = stage("/run/tower", of(first), trained=("vision", "projector"), tokens=20)
    large = stage("/run/large", trained=("llm",), tokens=300)
    return stage(
        "/run/carried", of(tower, "vision", donor=True), of(large, "llm"), trained=("vision (LoRA)",), tokens=4000
    )


# -- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path: Path, carried: Lineage) -> None:
    write_lineage(carried, tmp_path)
    assert read_lineage(tmp_path) == carried
    assert [file.name for file in tmp_path.iterdir()] == [LINEAGE_NAME]


def test_nothing_counted_and_nothing_recorded_is_read_as_none(tmp_path: Path) -> None:
    lone = stage("/run/lone", RELEASED, tokens=None)
    write_lineage(lone, tmp_path)
    assert read_lineage(tmp_path) == lone


def test_file_lists_each_stage_once_oldest_first(tmp_path: Path, carried: Lineage) -> None:
    """`last` comes from `carried` and `tower`, which `carried` comes from too: five stages, not seven."""
    tower = carried.origins[0].lineage
    assert tower is not None
    last = stage("/run/last", of(carried, "llm"), of(tower, "vision"))
    write_lineage(last, tmp_path)
    content = json.loads((tmp_path / LINEAGE_NAME).read_text(encoding="utf-8"))
    assert content["format"] == 1
    assert [entry["stage"] for entry in content["stages"]] == ["first", "tower", "large", "carried", "last"]
    assert [origin["stage"] for origin in content["stages"][4]["origins"]] == [3, 1]
    assert read_lineage(tmp_path) == last


def test_weights_folder_finds_the_file_of_its_stage(tmp_path: Path, carried: Lineage) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    write_lineage(carried, tmp_path)
    assert read_lineage(weights) == carried
    nearer = stage("/copied")
    write_lineage(nearer, weights)
    assert read_lineage(weights) == nearer


def test_no_file_is_no_lineage(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    write_lineage(stage("/run/one"), tmp_path)
    assert read_lineage(tmp_path / "csv") is None
    assert read_lineage(tmp_path / "gone") is None


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    write_lineage(stage("/run/one"), tmp_path)
    program = (
        "import sys; from pathlib import Path; from ivl_lightning.checkpoints.lineage import read_lineage; "
        f"read_lineage(Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_long_families_are_read(tmp_path: Path) -> None:
    """300 generations, more than a reader of nested JSON takes."""
    last = stage("/run/0")
    for generation in range(1, 300):
        last = stage(f"/run/{generation}", of(last))
    write_lineage(last, tmp_path)
    found = read_lineage(tmp_path)
    assert found is not None
    assert [one.folder for one in ancestors(found)] == [f"/run/{generation}" for generation in range(299)]


# -- wrong files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not valid JSON"),
        ('{"format": 1, "stages": [', "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "format: Field required"),
        ('{"format": 0, "stages": []}', "format: Input should be 1"),
        ('{"format": 1, "stages": []}', "names no stage"),
    ],
)
def test_damaged_file_is_named_with_its_fault(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / LINEAGE_NAME
    file.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=fault) as caught:
        read_lineage(tmp_path)
    assert str(caught.value).startswith(f"{file} ")
    assert "delete it" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": "many"}, r"stages\.0\.steps: Input should be a valid integer"),
        ({"tokens": -0.5}, r"stages\.0\.tokens: "),
        ({"trained": "llm"}, r"stages\.0\.trained: "),
        ({"parts": {"vision": {"parameters": 7}}}, r"stages\.0\.parts\.vision\.before: Field required"),
        ({"origins": [{"path": "/a", "brings": [], "donor": False, "stage": 0}]}, "stage 0 comes from stage 0"),
        ({"origins": [{"path": "/a", "brings": [], "donor": False, "stage": -1}]}, "stage 0 comes from stage -1"),
    ],
)
def test_wrong_value_is_named_with_its_place(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    write_lineage(stage("/run/one"), tmp_path)
    file = tmp_path / LINEAGE_NAME
    content = json.loads(file.read_text())
    content["stages"][0] |= changes
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=fault):
        read_lineage(tmp_path)


def test_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / LINEAGE_NAME).write_text('{"format": 2, "people": {}}')
    with pytest.raises(CheckpointError, match="is of format 2, known here is 1: use the version that wrote it"):
        read_lineage(tmp_path)


# -- the family -------------------------------------------------------------------------------------------------------


def test_ancestors_stand_oldest_first_and_once(carried: Lineage) -> None:
    tower = carried.origins[0].lineage
    assert tower is not None
    last = stage("/run/last", of(carried, "llm"), of(tower, "vision"), RELEASED)
    assert [one.stage for one in ancestors(last)] == ["first", "tower", "large", "carried"]
    assert ancestors(stage("/run/alone")) == []


def test_tokens_of_the_tower_follow_the_tower_alone(carried: Lineage) -> None:
    """4000 by adapters of the stage itself and 20 by `tower`; `first` (1) and `large` (300) trained no tower."""
    assert tower_tokens(carried) == 4020


def test_tokens_that_a_stage_of_the_tower_did_not_count_are_unknown() -> None:
    uncounted = stage("/run/tower", trained=("vision",), tokens=None)
    assert tower_tokens(stage("/run/last", of(uncounted))) is None
    beside = stage("/run/large", trained=("llm",), tokens=None)
    assert tower_tokens(stage("/run/last", of(beside), trained=("vision",), tokens=5)) == 5


def test_tower_is_random_until_something_trains_it(carried: Lineage) -> None:
    untrained = stage("/run/large", trained=("llm",))
    assert not has_trained_tower(untrained)
    assert not has_trained_tower(stage("/run/next", of(untrained), trained=("projector",)))
    assert has_trained_tower(carried)
    assert has_trained_tower(stage("/run/next", RELEASED, trained=("projector",)))
