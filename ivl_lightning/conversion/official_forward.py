"""Reference forward pass of an InternVL checkpoint in OpenGVLab's original layout: the yardstick of a conversion.

It works on the original tensors by their original names and on the original config.json, in plain torch, and shares
nothing with the key map or with transformers' classes, so that a mistake there shows as a difference. A tensor is read
where it is used, computed with in float32, and forgotten: memory is that of one layer.

Source of the rules: OpenGVLab/InternVL, commit 2410d1d. Dropout and drop path are absent, as in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivl_lightning.conversion.official_language import embed, language_forward
from ivl_lightning.conversion.official_primitives import Read, Section, UnsupportedError
from ivl_lightning.conversion.official_vision import vision_forward

__all__ = ["OfficialOutputs", "Read", "UnsupportedError", "official_forward"]


@dataclass(frozen=True, slots=True)
class OfficialOutputs:
    """Outputs of the reference forward pass, all float32.

    Args:
        vision_hidden: `[N, 1 + patches, C]` hidden states of the vision tower's last layer, whatever `select_layer` is;
            None without tiles.
        image_features: `[N, tokens per tile, H]` of the selected layer, after pixel shuffle and projector; None without
            tiles.
        logits: `[L, vocabulary]`.
    """

    vision_hidden: Tensor | None
    image_features: Tensor | None
    logits: Tensor


def official_forward(
    read: Read, config: Mapping[str, Any], input_ids: Tensor, pixel_values: Tensor | None, *, image_token_id: int
) -> OfficialOutputs:
    """One document through vision tower, projector and language model, without gradients.

    Attention is causal and positions are 0 to L - 1. The image features replace the embeddings of the image tokens in
    order, row by row.

    Args:
        read: gives a tensor by its original name, on the device of the inputs.
        config: the parsed original config.json; what is missing takes the default of the original's config class.
        input_ids: `[L]`, int64.
        pixel_values: `[N, 3, S, S]` normalized tiles, or None for a document of text.
        image_token_id: id of `<IMG_CONTEXT>`; the original takes it from the tokenizer.

    Raises:
        UnsupportedError: a setting without a rule here.
        ValueError: the features are not as many as the image tokens, or the position table does not fit the config.
    """
    Section("", config, {"use_llm_lora": 0}).one_of("use_llm_lora", 0)
    with torch.no_grad():
        hidden, features = (None, None) if pixel_values is None else vision_forward(read, config, pixel_values)
        embeddings = _fuse(embed(read, config, input_ids), input_ids == image_token_id, features)
        return OfficialOutputs(hidden, features, language_forward(read, config, embeddings))


def _fuse(embeddings: Tensor, image_tokens: Tensor, features: Tensor | None) -> Tensor:
    rows = embeddings[:0] if features is None else features.flatten(0, 1)
    if len(rows) != image_tokens.sum():
        # The original prints a warning and goes on with the first rows: nothing to measure by.
        raise ValueError(f"{len(rows)} rows of image features meet {image_tokens.sum().item()} image tokens")
    return embeddings.masked_scatter(image_tokens[:, None], rows)
