"""Where tensors come from: names, shapes and reading one at a time, whatever lies behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_SHOWN_NAMES = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; says which file and tensor, and what to do."""


class TensorSource(Protocol):
    """Tensors by name, read when they are asked for."""

    def names(self) -> list[str]:
        """Names of all tensors, in the order in which reading is cheapest."""
        ...

    def meta(self, name: str) -> Tensor:
        """Shape and type of a tensor, on the meta device."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU. It may lie in the file itself: never write to it.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...


@runtime_checkable
class RowSource(TensorSource, Protocol):
    """A source that can read some rows of a tensor without looking at the others."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows from `start` up to `stop`; see `read`."""
        ...


def read_rows(source: TensorSource, name: str, start: int, stop: int) -> Tensor:
    """Rows of a tensor from `start` up to `stop`.

    A tensor of a safetensors file is a view of the file: of what is not used nothing is read. So only sources that
    rearrange tensors have a way of their own.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(source, RowSource):
        return source.read_rows(name, start, stop)
    return source.read(name)[start:stop]


class MemorySource:
    """Tensors that lie in memory.

    Args:
        tensors: by name.
        origin: what they are, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: str = "memory") -> None:
        self._tensors = tensors
        self._origin = origin

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return list(self._tensors)

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._tensors[name].to("meta")

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._tensors[name].detach()

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._origin


class Renamed:
    """Tensors of another source under other names, all or some of them.

    Args:
        source: of the tensors.
        old_names: name here -> name there.
    """

    def __init__(self, source: TensorSource, old_names: Mapping[str, str]) -> None:
        self._source = source
        self._old = old_names

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return list(self._old)

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._source.meta(self._old[name])

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._source.read(self._old[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `RowSource`."""
        return read_rows(self._source, self._old[name], start, stop)

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._source.where(self._old[name])


def renamed(source: TensorSource, rename: Callable[[str], str | None]) -> Renamed:
    """Give each tensor of a source another name.

    Args:
        source: of the tensors.
        rename: old name -> new name, or None for a tensor that is not to be seen.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    old_names: dict[str, str] = {}
    for name in source.names():
        new = rename(name)
        if new is None:
            continue
        if new in old_names:
            raise CheckpointError(
                f"{source.where(name)}: {name} and {old_names[new]} are both the model's {new}: remove one of them"
            )
        old_names[new] = name
    return Renamed(source, old_names)


class Combined:
    """Several sources as one; a later one takes the place of an earlier one's tensors.

    Args:
        sources: of the tensors.
    """

    def __init__(self, sources: Iterable[TensorSource]) -> None:
        self._holder = {name: source for source in sources for name in source.names()}

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return list(self._holder)

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._holder[name].meta(name)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._holder[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `RowSource`."""
        return read_rows(self._holder[name], name, start, stop)

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._holder[name].where(name)


class Cast:
    """Tensors of another source in another type.

    Args:
        source: of the tensors.
        dtype: of floating-point tensors; None leaves each as it is.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype | None) -> None:
        self._source = source
        self._dtype = dtype

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return self._source.names()

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._cast(self._source.meta(name))

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._cast(self._source.read(name))

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._source.where(name)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor


def listed(names: Iterable[str]) -> str:
    """The first names of many, for a message."""
    found = sorted(names)
    more = f" and {len(found) - _SHOWN_NAMES} more" if len(found) > _SHOWN_NAMES else ""
    return ", ".join(found[:_SHOWN_NAMES]) + more
