"""Running the cases of a module on one process and on two ranks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.commands import run_module


def run_cases(module: str, folder: Path, cases: Mapping[int, Sequence[str]], *, timeout: int) -> dict[str, Any]:
    """What each case gave, by its name.

    Args:
        module: below `tests.distributed`; takes folder and `SIZE:CASE,CASE` for each size, writes `SIZE.pt` and logs.
        folder: of its data and results.
        cases: number of ranks -> cases.
        timeout: seconds after which ranks that hang are ended.
    """
    sizes = (f"{size}:{','.join(names)}" for size, names in cases.items())
    process = run_module(f"tests.distributed.{module}", folder, *sizes, timeout=timeout)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))
    assert process.returncode == 0, process.stderr[-3000:]
    found: dict[str, Any] = {}
    for size, names in cases.items():
        found |= torch.load(folder / f"{size}.pt", weights_only=True) if (folder / f"{size}.pt").is_file() else {}
        assert set(names) <= set(found), logs
    return found
