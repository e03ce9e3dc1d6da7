"""Trains the tiny model in every layout and writes what came out; `python -m ... FOLDER SIZE:CASE,CASE ...`.

Groups of ranks are forked from a process that has imported everything; each loops over its cases, and a group begins
when those before it have ended, whose checkpoints it may go on from. A rank that torchrun has started runs its cases
itself.

A case is one of `fit_cases`, or `mpo/` and one of `preference_cases`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed import fit_cases, preference_cases
from tests.distributed.preference_cases import fork_group, wait


def fit(folder: Path, out: Path, case: str, world_size: int) -> dict[str, Any]:
    """One case; checkpoints of all groups lie side by side."""
    if case.startswith("mpo/"):
        found = preference_cases.fit(folder / "pairs/pairs.json", out, case.removeprefix("mpo/"), world_size)
        return {name: found[name] for name in ("losses", "gradients", "steps", "empty", "validation")}
    return fit_cases.fit(folder / "data/meta.json", folder / "kept", case, world_size)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    groups = [(int(size), cases.split(",")) for size, cases in (entry.split(":") for entry in sys.argv[2:])]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        size, cases = groups[0]
        results = {case: fit(folder, folder / "nodes", case, size) for case in cases}
        if os.environ["RANK"] == "0":
            torch.save(results, folder / "nodes" / f"{size}.pt")
        return
    for number, (size, cases) in enumerate(groups):
        out = folder / str(number)
        out.mkdir()
        wait([fork_group(folder, out, size, cases, fit)])


if __name__ == "__main__":
    main()
