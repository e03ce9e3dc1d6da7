"""Position embeddings of a vision tower for tiles of another size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ivl_lightning.checkpoints.source import TensorSource, read_rows

POSITIONS = "model.vision_tower.embeddings.position_embeddings"


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Bicubic interpolation to another grid; the class token's stays.

    Source: `resize_pos_embeddings` of the original's `modeling_intern_vit.py`: in float32, corners not aligned.

    Args:
        positions: `[1, 1 + n * n, C]`.
        side: patches along a side of the new grid.

    Returns:
        `[1, 1 + side * side, C]` in the type of `positions`.
    """
    old_side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].unflatten(1, (old_side, old_side)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False)
    patches = resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :1], patches], dim=1)


class ResizedPositions:
    """Native tensors of which the position embeddings are resized.

    Args:
        source: with native names.
        side: patches along a side of the new grid.
    """

    def __init__(self, source: TensorSource, side: int) -> None:
        self._source = source
        self._side = side

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return self._source.names()

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        meta = self._source.meta(name)
        return resize_positions(meta, self._side) if name == POSITIONS else meta

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        tensor = self._source.read(name)
        return resize_positions(tensor, self._side) if name == POSITIONS else tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `RowSource`."""
        return self.read(name)[start:stop] if name == POSITIONS else read_rows(self._source, name, start, stop)

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._source.where(name)
