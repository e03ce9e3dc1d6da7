"""The projector of InternVL 1.1 and 1.2, whose image tokens run down the columns of the tile."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from ivl_lightning.models.original_config import is_transposed


class TransposedProjector(InternVLMultiModalProjector):
    """The library's projector after a transposition of the grid of tokens; its state dict is unchanged.

    Source: `ps_version` v1 of the original's `pixel_shuffle`, which leaves the two spatial axes swapped: token
    t = j * side + i is that of row i and column j. Norm and linear layers work on each token by itself, so the grid may
    be transposed before them.
    """

    def forward(self, image_features: Tensor) -> Tensor:
        """Args: image_features `[tiles, side * side, 4 * C]`, row after row. Returns `[tiles, side * side, D]`."""
        side = round(image_features.shape[1] ** 0.5)
        grid = image_features.unflatten(1, (side, side))
        embeddings: Tensor = super().forward(grid.transpose(1, 2).flatten(1, 2))
        return embeddings


def choose_projector(model: InternVLForConditionalGeneration) -> None:
    """Give a model of `ps_version` v1 its projector, in place; parameters stay the same objects."""
    if not is_transposed(model.config):
        return
    old = model.model.multi_modal_projector
    with torch.device("meta"):
        projector = TransposedProjector(model.config)
    for name, module in old.named_children():
        setattr(projector, name, module)
    model.model.multi_modal_projector = projector
