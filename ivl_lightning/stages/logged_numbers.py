"""Logging what the host knows already."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch


def log_numbers(module: L.LightningModule, numbers: Mapping[str, float]) -> None:
    """Log numbers of a training step as they are.

    Lightning would round them to float32, send each one to the device and fetch it back.
    """
    for name, number in numbers.items():
        module.log(name, torch.tensor(number, dtype=torch.float64), batch_size=1)
