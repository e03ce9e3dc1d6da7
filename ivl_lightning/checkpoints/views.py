"""A checkpoint of one layout seen as one of another: nothing is copied before a tensor is read."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ivl_lightning.checkpoints.key_map import KeyTable
from ivl_lightning.checkpoints.source import CheckpointError, TensorSource, listed, read_rows
from ivl_lightning.checkpoints.splits import Split, Whole

_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Buffers that old releases stored although they follow from the configuration."""


def is_computed(name: str) -> bool:
    """Whether a stored tensor is one of those."""
    return _COMPUTED.fullmatch(name) is not None


class AsNative:
    """Tensors of the original layout under native names.

    Args:
        source: of the original layout.
        table: its key table.

    Attributes:
        left_out: names of stored buffers that are computed instead.

    Raises:
        CheckpointError: tensors that no rule knows.
    """

    def __init__(self, source: TensorSource, table: KeyTable) -> None:
        self._source = source
        self._parts: dict[str, tuple[str, int, Split]] = {}
        self.left_out = [name for name in source.names() if is_computed(name)]
        surplus = []
        for name in source.names():
            found = table.to_native(name)
            if is_computed(name):
                continue
            if found is None:
                surplus.append(name)
                continue
            natives, split = found
            self._parts.update({native: (name, place, split) for place, native in enumerate(natives)})
        _refuse_surplus(source, surplus)

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return list(self._parts)

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        original, place, split = self._parts[name]
        return self._split(original, split, self._source.meta(original))[place]

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        original, place, split = self._parts[name]
        return self._split(original, split, self._source.read(original))[place]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `RowSource`."""
        original, place, split = self._parts[name]
        if isinstance(split, Whole):
            return read_rows(self._source, original, start, stop)
        # Splits move whole rows, so their numbers are split like they are.
        numbers = torch.arange(self._source.meta(original).shape[0], device="cpu")
        wanted = self._split(original, split, numbers)[place][start:stop]
        return self._source.read(original)[wanted]

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._source.where(self._parts[name][0])

    def _split(self, original: str, split: Split, tensor: Tensor) -> tuple[Tensor, ...]:
        try:
            return split.split(tensor)
        except ValueError as error:
            raise CheckpointError(f"{self._source.where(original)}: {original}: {error}") from error


class AsOriginal:
    """Native tensors under the names of the original layout.

    Args:
        source: with native names.
        table: the key table of the original layout.

    Raises:
        CheckpointError: tensors that no rule knows, or a part of an original tensor that is missing.
    """

    def __init__(self, source: TensorSource, table: KeyTable) -> None:
        self._source = source
        self._wholes: dict[str, tuple[tuple[str, ...], Split]] = {}
        known, surplus = set(source.names()), []
        for name in source.names():
            original = table.to_original(name)
            if original is None:
                surplus.append(name)
                continue
            found = table.to_native(original)
            assert found is not None, (name, original)
            self._wholes[original] = found
        _refuse_surplus(source, surplus)
        missing = [part for parts, _ in self._wholes.values() for part in parts if part not in known]
        if missing:
            raise CheckpointError(f"tensors are missing: {listed(missing)}. The checkpoint is not complete")

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return list(self._wholes)

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        parts, split = self._wholes[name]
        return self._join(name, split, [self._source.meta(part) for part in parts])

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        parts, split = self._wholes[name]
        return self._join(name, split, [self._source.read(part) for part in parts])

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._source.where(self._wholes[name][0][0])

    def _join(self, name: str, split: Split, parts: list[Tensor]) -> Tensor:
        try:
            return split.join(parts)
        except ValueError as error:
            raise CheckpointError(f"{self.where(name)}: {name}: {error}") from error


def _refuse_surplus(source: TensorSource, surplus: list[str]) -> None:
    if surplus:
        raise CheckpointError(
            f"{source.where(surplus[0])} holds {len(surplus)} tensors that are no part of the model its config.json "
            f"describes: {listed(surplus)}. Correct config.json, or take the file that belongs to it"
        )


def check_complete(source: TensorSource, expected: dict[str, tuple[int, ...]], described_by: str) -> None:
    """Every tensor of the model exactly once, in its shape.

    Args:
        source: with native names.
        expected: native name -> shape.
        described_by: the configuration, for messages.

    Raises:
        CheckpointError: a missing or surplus tensor, or one of another shape.
    """
    found = source.names()
    missing = expected.keys() - set(found)
    if missing:
        raise CheckpointError(
            f"{described_by} describes tensors that the checkpoint does not hold: {listed(missing)}. Fetch the missing "
            "files again, or correct the configuration"
        )
    _refuse_surplus(source, [name for name in found if name not in expected])
    for name in found:
        shape = tuple(source.meta(name).shape)
        if shape != expected[name]:
            raise CheckpointError(
                f"{source.where(name)}: {name} has the shape {shape}, but {described_by} makes it {expected[name]}: "
                "correct the field of the configuration that decides it, or take the file that belongs to it"
            )
