"""Run by torchrun, started once: bad steps under DDP and FSDP and their replays, and at last a stall, which ends it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from ivl_lightning.callbacks.watchdog import Watchdog
from tests.faults import bad_step_cases, stall_cases


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for strategy, back in (("ddp", 0), ("fsdp", 1)):
        options = [*arguments, f"strategy={strategy}", "trainer.devices=2"]
        config = bad_step_cases.compose(options, folder / strategy)
        result = bad_step_cases.train(config)
        everyone: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyone, result)
        bad_step_cases.replay(config, len(result["taken"]) - back)
        found[strategy] = everyone
    if bad_step_cases.is_first():
        torch.save(found, folder / "ranks.pt")
    # Longer than either rank needs to begin, and than a busy machine needs for a step.
    watchdog = Watchdog(minutes=3 / 60, every_seconds=0.3, stop=True, timeout_minutes=0.01)
    stall_cases.fit(folder / "stall", watchdog, ranks=2, workers=1)


if __name__ == "__main__":
    main()
