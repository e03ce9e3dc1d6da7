"""How one tensor of the original layout stands for several of the native one, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Split(Protocol):
    """A two-way rule between one tensor and its parts; works on meta tensors too, which is how shapes are known."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts of an original tensor.

        Raises:
            ValueError: its rows cannot be divided so.
        """
        ...

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The original tensor of its parts.

        Raises:
            ValueError: the parts are not of the sizes that the original has.
        """
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """The tensor goes over as it is."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """See `Split`."""
        return (tensor,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Split`."""
        (tensor,) = parts
        return tensor


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """Rows stand in equal blocks, one after the other: the vision tower's qkv, `[3 * C, ...]`.

    Attributes:
        count: of the blocks.
    """

    count: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """See `Split`."""
        if tensor.shape[0] % self.count:
            raise ValueError(f"its {tensor.shape[0]} rows are not {self.count} equal blocks")
        return tensor.chunk(self.count)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Split`."""
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"the parts to be joined differ in shape: {[tuple(part.shape) for part in parts]}")
        return torch.cat(list(parts))


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """InternLM2's wqkv: for each key-value head its query heads, then its key, then its value.

    Source: `modeling_internlm2.py`. Rows are `[kv_heads, heads / kv_heads + 2, head_dim]`. Query head g * n + i is the
    i-th of group g, which is the order in which Llama repeats key-value heads; both rotate halves, so that no row is
    permuted.

    Attributes:
        heads: query heads.
        kv_heads: key-value heads.
    """

    heads: int
    kv_heads: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """See `Split`."""
        slots = self.heads // self.kv_heads + 2
        if tensor.shape[0] % (self.kv_heads * slots):
            raise ValueError(
                f"its {tensor.shape[0]} rows are not {self.kv_heads} groups of {slots - 2} query heads, a key and a "
                "value: num_attention_heads or num_key_value_heads of the configuration is wrong"
            )
        grouped = tensor.unflatten(0, (self.kv_heads, slots, -1))
        return grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Split`."""
        query, key, value = parts
        if key.shape != value.shape or query.shape[0] * self.kv_heads != key.shape[0] * self.heads:
            raise ValueError(
                f"q, k, v of shapes {[tuple(part.shape) for part in parts]} do not belong to {self.heads} query heads "
                f"and {self.kv_heads} key-value heads"
            )
        groups = query.unflatten(0, (self.kv_heads, self.heads // self.kv_heads, -1))
        pair = [part.unflatten(0, (self.kv_heads, 1, -1)) for part in (key, value)]
        return torch.cat([groups, *pair], dim=1).flatten(0, 2)
