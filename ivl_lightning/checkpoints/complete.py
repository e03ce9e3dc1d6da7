"""Which checkpoints of a stage are whole: a run may be killed at any moment, in the middle of a save too.

A checkpoint is a folder of parts. Its last file, `complete.json`, names the others with their sizes and is put there in
one move, so a folder without it, or with a part that is missing or short, is what a save has left that did not end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

COMPLETE_NAME = "complete.json"
_NAME = re.compile(r"step=(\d+)\.ckpt")


def checkpoint_name(steps: int) -> str:
    """Name of the checkpoint behind so many optimizer steps."""
    return f"step={steps:08d}.ckpt"


def steps_of(path: Path) -> int:
    """Finished optimizer steps of a checkpoint, from its name.

    Raises:
        ValueError: another name.
    """
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"{path} is not named like a checkpoint, {checkpoint_name(0)}")
    return int(found[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints of a folder, whole or not, by rising steps."""
    return sorted((path for path in folder.glob("step=*.ckpt") if _NAME.fullmatch(path.name)), key=steps_of)


def newest_complete(folder: Path, *, at_most: int | None = None) -> Path | None:
    """The whole checkpoint with the most steps; None where there is none.

    Args:
        folder: of a stage's checkpoints.
        at_most: leave out those of more steps.
    """
    found = [path for path in checkpoints_in(folder) if at_most is None or steps_of(path) <= at_most]
    return next((path for path in reversed(found) if is_complete(path)), None)


def is_complete(path: Path) -> bool:
    """Whether all parts of a checkpoint stand."""
    return not faults(path)


def faults(path: Path) -> list[str]:
    """What a checkpoint lacks, for people; a single file, as Lightning's own strategies write it, lacks nothing."""
    if path.is_file():
        return []
    try:
        parts = json.loads((path / COMPLETE_NAME).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"no {COMPLETE_NAME}: saving it did not end"]
    return [fault for name, size in parts.items() if (fault := _fault(path / name, size))]


def _fault(part: Path, size: int) -> str | None:
    if not part.is_file():
        return f"no {part.name}"
    found = part.stat().st_size
    return f"{part.name} has {found} bytes in place of {size}" if found < size else None


def write_complete(path: Path, files: Mapping[str, int], *, ranks: int) -> None:
    """Mark a checkpoint as whole, once its parts are on disk.

    Args:
        path: its folder.
        files: name of each part -> its size in bytes.
        ranks: processes that saved it.
    """
    content = json.dumps({"format": 1, "ranks": ranks, "files": dict(files)}, indent=2)
    replace_file(path / COMPLETE_NAME, content.encode())
    sync_folder(path)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, down to the disk."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def sync_folder(path: Path) -> None:
    """Names of a folder's files down to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a checkpoint, or what a save has left; from the first moment on it counts as none."""
    if path.is_file():
        path.unlink()
        return
    (path / COMPLETE_NAME).unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
