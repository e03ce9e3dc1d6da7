"""Reading the parts that ranks have saved of a checkpoint, with nothing in them that could run."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from ivl_lightning.checkpoints.source import CheckpointError

META_NAME = "meta.pt"
"""What is no tensor of the module or the optimizer."""
METADATA_NAME = ".metadata"
"""Torch's own table of which tensor lies where."""

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
}
_DTYPES = ("float", "bfloat", "int", "uint", "bool", "complex")


class PartsReader(FileSystemReader):
    """Torch's own, which would read the table anew with each tensor, and run whatever is in it.

    Args:
        path: folder of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table.

        Raises:
            CheckpointError: it is missing, damaged, or names more than a table needs.
        """
        if self._metadata is None:
            self._metadata = _read(self._folder / METADATA_NAME)
            self.storage_data = self._metadata.storage_data
        return self._metadata

    def names(self) -> set[str]:
        """Of all tensors, and of whatever else ranks have saved."""
        return set(self.read_metadata().state_dict_metadata)


class _Unpickler(pickle.Unpickler):
    """Takes what the table is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and name.startswith(_DTYPES)
        if module in _MODULES or name in _NAMES.get(module, ()) or of_torch:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _read(path: Path) -> Metadata:
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except (OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): take an earlier checkpoint") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is no table of a checkpoint's parts: take an earlier checkpoint")
    return metadata


@contextmanager
def alone(distributed: bool = False) -> Iterator[None]:
    """Where there is no process group, torch need not say that there is none."""
    with warnings.catch_warnings():
        if not distributed:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
