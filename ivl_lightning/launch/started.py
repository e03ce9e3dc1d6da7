"""What a stage's folder keeps of the machine that trains it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from ivl_lightning.environment import FOLDER, note_start


@rank_zero_only
def note_machine(trainer: L.Trainer, folder: Path) -> None:
    """Add this start to environment.json, as the first rank sees it.

    Args:
        trainer: of the stage.
        folder: of the stage.
    """
    ranks, nodes = trainer.world_size, trainer.num_nodes
    note_start(
        folder,
        {
            "devices": f"{ranks} x {device_name(trainer.strategy.root_device)}",
            "nodes": str(nodes),
            "precision": str(trainer.precision),
            "CUDA": torch.version.cuda or "none",
            FOLDER: str(Path.cwd()),
        },
    )


def device_name(device: torch.device) -> str:
    """What a device is sold as; of a CPU its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
