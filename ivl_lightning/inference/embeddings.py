"""Tokens and tiles -> input embeddings: the one way, for training, scoring and generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from ivl_lightning.data.tiling import normalize_tiles
from ivl_lightning.models.parts import tile_size


def embed(
    internvl: InternVLForConditionalGeneration,
    input_ids: Tensor,
    tiles: Tensor,
    names: Sequence[str],
    *,
    always_run_vision: bool = False,
) -> Tensor:
    """Embeddings `[B, L, D]` of the tokens, the tiles' features in place of the context tokens.

    Args:
        internvl: the network.
        input_ids: `[B, L]`.
        tiles: uint8 `[N, 3, S, S]` of all rows, in the order of their context tokens; N may be 0.
        names: of the records, for errors.
        always_run_vision: run the vision tower on a blank tile where there is none; its features count for nothing.

    Raises:
        ValueError: tiles and context tokens do not match; names the records.
    """
    embeds = internvl.get_input_embeddings()(input_ids)
    # A spread network has its vision tower and its word embeddings where it has room.
    slots = (input_ids == internvl.config.image_token_id).to(embeds.device)
    if len(tiles):
        features = _features(internvl, tiles).to(embeds.device)
        _check_slots(int(slots.sum()), features, names)
        return embeds.masked_scatter(slots.unsqueeze(-1), features.to(embeds.dtype))
    if always_run_vision:
        side = tile_size(internvl.config)
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=embeds.device)
        return embeds + 0.0 * _features(internvl, blank).sum().to(embeds)
    return embeds


def _features(internvl: InternVLForConditionalGeneration, tiles: Tensor) -> Tensor:
    """Context-token embeddings `[N, tokens per tile, D]` of uint8 tiles `[N, 3, S, S]`."""
    pixels = normalize_tiles(tiles, dtype=internvl.dtype)
    return internvl.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output


def _check_slots(slots: int, features: Tensor, names: Sequence[str]) -> None:
    available = features.shape[0] * features.shape[1]
    if slots != available:
        raise ValueError(
            f"{slots} image slots in the text but {available} features from {features.shape[0]} tiles, in one of: "
            f"{', '.join(names)}. The tile settings of data and model differ, or a record holds a literal "
            "image token"
        )
