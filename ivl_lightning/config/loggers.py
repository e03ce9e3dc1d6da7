"""Rules of the loggers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

_PACKAGES = {"WandbLogger": "wandb", "TensorBoardLogger": "tensorboard"}
"""Loggers of Lightning and the packages they need, which are also the names of our extras."""


def logger_faults(loggers: Mapping[str, dict[str, Any] | None]) -> list[str]:
    """Packages that are not there, said before anything is loaded."""
    classes = (entry["_target_"].rpartition(".")[2] for entry in loggers.values() if entry is not None)
    needed = [_PACKAGES[name] for name in classes if name in _PACKAGES]
    return [
        f"logger={package} needs a package that is not installed: pip install 'ivl-lightning[{package}]', or choose "
        "logger=csv; metrics.jsonl is always written"
        for package in needed
        if importlib.util.find_spec(package) is None
    ]
