"""Reading a trainer's checkpoint, one file or a folder of shards, without the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ivl_lightning.checkpoints.files import load_tensors
from ivl_lightning.checkpoints.parts import META_NAME, METADATA_NAME, PartsReader, alone
from ivl_lightning.checkpoints.source import CheckpointError, MemorySource, TensorSource, renamed

_STATE = "state_dict"


def open_lightning(path: Path) -> tuple[TensorSource, dict[str, Any]]:
    """The tensors of the module a trainer saved, and what else the checkpoint says.

    Args:
        path: a `.ckpt` file, or a folder of parts.

    Raises:
        CheckpointError: it is missing, incomplete or damaged.
    """
    if path.is_file():
        content = load_tensors(path)
        state = content.pop(_STATE, None)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} has no {_STATE}: it is no checkpoint of a Lightning trainer")
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return MemorySource(tensors, str(path)), content
    missing = [name for name in (METADATA_NAME, META_NAME) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)}: saving it was interrupted, take an earlier one"
        )
    prefix = f"{_STATE}."
    shards = _Shards(path)
    return renamed(shards, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None), load_tensors(
        path / META_NAME
    )


class _Shards:
    """Tensors that ranks have saved in pieces."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = PartsReader(path)
        entries = self._reader.read_metadata().state_dict_metadata
        self._entries = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def names(self) -> list[str]:
        return list(self._entries)

    def meta(self, name: str) -> Tensor:
        entry = self._entries[name]
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.meta(name), device="cpu")
        try:
            with alone():
                load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._path}: {name} cannot be read ({error}): take an earlier checkpoint"
            ) from error
        return tensor

    def where(self, name: str) -> str:
        return str(self._path)
