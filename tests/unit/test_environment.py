"""What a stage's folder keeps of where it ran."""

import json
from pathlib import Path

from ivl_lightning.environment import ENVIRONMENT_NAME, environment, git_commit, note_start


def starts(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / ENVIRONMENT_NAME).read_text())


def test_starts_on_another_machine_are_added(tmp_path: Path) -> None:
    """A start like the last one is none of its own; one that differs is, also where an earlier one was like it."""
    for devices in ("1 x A", "1 x A", "8 x B", "1 x A"):
        note_start(tmp_path / "stage", {"devices": devices})
    found = starts(tmp_path / "stage")
    assert [start["devices"] for start in found] == ["1 x A", "8 x B", "1 x A"]
    assert {**found[0], **environment()} == found[0]
    assert all(start["started"] for start in found)


def test_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
