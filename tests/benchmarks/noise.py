"""Random weights of any size that take no memory until they are written."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Noise:
    """Random bfloat16 numbers in the shapes of a model, made when they are read; see `TensorSource`.

    Args:
        model: on the meta device will do.
        prefix: put before its names.
    """

    def __init__(self, model: nn.Module, prefix: str = "") -> None:
        self._shapes = {prefix + name: value.shape for name, value in model.named_parameters()}

    def names(self) -> list[str]:
        return list(self._shapes)

    def meta(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], dtype=torch.bfloat16, device="meta")

    def read(self, name: str) -> Tensor:
        return torch.randint(0, 2**14, self._shapes[name], dtype=torch.int16).view(torch.bfloat16)

    def where(self, name: str) -> str:
        return "noise"
