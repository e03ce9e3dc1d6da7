"""Where something was run: versions, kind of machine, state of the code. Nothing here names a host."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from ivl_lightning.whole_files import write_whole

ENVIRONMENT_NAME = "environment.json"
"""In a stage's folder: where it ran, one entry for each start on another machine or with other code."""

FOLDER = "folder"
"""Entry of a start: the folder that it was given in."""
_PACKAGES = ("ivl-lightning", "torch", "lightning", "transformers")
_ROOT = Path(__file__).resolve().parents[1]
_GIB = 2**30


def environment() -> dict[str, str]:
    """Names and values, ready to be shown."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "CPUs": str(os.cpu_count()),
        "memory": f"{_memory() / _GIB:.0f} GiB",
        "git commit": git_commit(_ROOT) or "none",
    }


def now() -> str:
    """Date and time, to the second."""
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def note_start(folder: Path, facts: Mapping[str, str]) -> None:
    """Add a start to `folder`/environment.json, unless it is like the last one there but for its time.

    Args:
        folder: of a stage.
        facts: what is known besides `environment`, such as devices.
    """
    file = folder / ENVIRONMENT_NAME
    starts: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    found = {**facts, **environment()}
    if starts and {**starts[-1], **found} == starts[-1]:
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([*starts, {"started": now(), **found}], indent=2, ensure_ascii=False)
    # In one move: a start that is killed here must not keep the next one from reading it.
    write_whole(file, text + "\n")


def git_commit(root: Path) -> str | None:
    """The commit a checkout stands at, and whether files differ from it; None where `root` is no checkout."""
    # An installed package may lie below somebody else's checkout, whose commit says nothing about this code.
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with local changes" if commit and changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where it is not installed or refuses."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
