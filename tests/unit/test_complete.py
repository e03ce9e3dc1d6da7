"""When a checkpoint counts, and what its table may hold."""

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from ivl_lightning.checkpoints.complete import (
    COMPLETE_NAME,
    checkpoint_name,
    faults,
    newest_complete,
    remove,
    steps_of,
    write_complete,
)
from ivl_lightning.checkpoints.parts import METADATA_NAME, PartsReader
from ivl_lightning.checkpoints.source import CheckpointError


def saved(folder, steps, *, part=b"12345678"):
    path = folder / checkpoint_name(steps)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(part)
    write_complete(path, {"__0_0.distcp": 8}, ranks=1)
    return path


def test_names_sort_as_steps_do():
    assert checkpoint_name(12) == "step=00000012.ckpt"
    with pytest.raises(ValueError, match="not named like a checkpoint"):
        steps_of(Path("last.ckpt"))


def test_only_whole_ones_count(tmp_path):
    """Of steps 1 to 5: 5 has no mark, 4 lacks a part, 3 has a part that is too short; 2 is the newest whole one."""
    for steps in range(1, 6):
        saved(tmp_path, steps)
    (tmp_path / checkpoint_name(5) / COMPLETE_NAME).unlink()
    (tmp_path / checkpoint_name(4) / "__0_0.distcp").unlink()
    (tmp_path / checkpoint_name(3) / "__0_0.distcp").write_bytes(b"1234567")
    assert newest_complete(tmp_path) == tmp_path / checkpoint_name(2)
    assert newest_complete(tmp_path, at_most=1) == tmp_path / checkpoint_name(1)
    assert newest_complete(tmp_path, at_most=0) is None
    assert newest_complete(tmp_path / "nowhere") is None
    told = {steps: faults(tmp_path / checkpoint_name(steps)) for steps in range(1, 6)}
    assert told[5] == ["no complete.json: saving it did not end"]
    assert told[4] == ["no __0_0.distcp"]
    assert told[3] == ["__0_0.distcp has 7 bytes in place of 8"]
    assert told[1] == told[2] == []


def test_steps_beyond_the_padding_still_sort(tmp_path):
    """9 digits sort before 8 as text; as steps they come last."""
    saved(tmp_path, 99_999_999)
    newest = saved(tmp_path, 100_000_000)
    assert newest_complete(tmp_path) == newest


def test_what_is_removed_is_gone_and_may_be_removed_again(tmp_path):
    path = saved(tmp_path, 1)
    for _ in range(2):
        remove(path)
        assert not path.exists()
    (tmp_path / "step=00000002.ckpt").write_bytes(b"a single file")
    assert newest_complete(tmp_path) == tmp_path / checkpoint_name(2)
    remove(tmp_path / checkpoint_name(2))
    assert newest_complete(tmp_path) is None


class Runs:
    """What a table may not hold: unpickling it runs a command."""

    def __reduce__(self):
        return (subprocess.check_call, (["touch", os.environ["IVL_TEST_MARK"]],))


def test_a_table_cannot_run_anything(tmp_path, monkeypatch):
    """`.metadata` is a pickle: whatever is no part of a table is refused before it is called."""
    mark = tmp_path / "ran"
    monkeypatch.setenv("IVL_TEST_MARK", str(mark))
    (tmp_path / METADATA_NAME).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(CheckpointError, match=r"subprocess.check_call has no place in it"):
        PartsReader(tmp_path).read_metadata()
    assert not mark.exists()
    (tmp_path / METADATA_NAME).write_bytes(pickle.dumps(torch.float32))
    with pytest.raises(CheckpointError, match="no table"):
        PartsReader(tmp_path).read_metadata()
