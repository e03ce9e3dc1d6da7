"""Which GPUs this process may use, found out without torch: a process that only starts others must not wait for it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the GPUs, as `CUDA_VISIBLE_DEVICES` takes them; empty where there are none.

    Args:
        environment: of the process; its own `CUDA_VISIBLE_DEVICES` counts before what the machine has.
    """
    chosen = environment.get(VISIBLE)
    if chosen is None:
        return _gpus_of_machine()
    names: list[str] = []
    for name in (part.strip() for part in chosen.split(",")):
        # As CUDA does: the first that is no GPU hides those behind it.
        if not name or name.startswith("-"):
            break
        names.append(name)
    return tuple(names)


def _gpus_of_machine() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    # Not by number: CUDA counts the fastest first, nvidia-smi by place on the bus.
    command = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return tuple(listed.stdout.split()) if listed.returncode == 0 else ()
