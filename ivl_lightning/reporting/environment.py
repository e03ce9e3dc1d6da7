"""Where a report was written: versions, machine, state of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("ivl-lightning", "torch", "lightning", "transformers")
_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Names and values, ready to be shown."""
    return {
        "written": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "CPUs": str(os.cpu_count()),
        "git commit": git_commit(_ROOT) or "none",
    }


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
