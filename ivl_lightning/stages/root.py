"""The module that runs a whole micro-batch: tiles and tokens in, the weighted loss sum out.

It is the root of FSDP. Everything that touches a parameter happens inside its forward (or inside its registered
`generate`), because outside of it parameters are shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from ivl_lightning.data.tiling import normalize_tiles
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.attention import boundaries
from ivl_lightning.models.parts import tile_size
from ivl_lightning.structures import PackedBatch, PromptBatch

GENERATION_ATTENTION = "sdpa"


class InternVLWithLoss(nn.Module):
    """Vision tower, projector, language model, selection of supervised rows and loss head, in one forward.

    Args:
        internvl: the network.
        head: the loss head.
        always_run_vision: run the vision tower on a blank tile where a micro-batch has none, so that every rank takes
            part in the same collectives and every trainable parameter gets a gradient. Its features count for nothing.
    """

    def __init__(
        self, internvl: InternVLForConditionalGeneration, head: NextTokenLoss, *, always_run_vision: bool = False
    ) -> None:
        super().__init__()
        self.internvl = internvl
        self.head = head
        self.always_run_vision = always_run_vision

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Weighted loss sum S (scalar) and unweighted token losses `[n]` of a micro-batch.

        Raises:
            ValueError: tiles and context tokens do not match; names the records.
        """
        hidden = self.hidden_states(batch)[0]
        rows = hidden[batch.loss_rows]
        return self.head(rows, self.internvl.lm_head.weight, batch.loss_targets, batch.loss_weights)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden states `[1, L, D]` of the packed row."""
        embeds = self._embed(batch.input_ids, batch.pixel_values, batch.sample_ids)
        return self.internvl.model.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            use_cache=False,
            **boundaries(batch.cu_seqlens, embeds.device),
        ).last_hidden_state

    def _embed(self, input_ids: Tensor, tiles: Tensor, names: Sequence[str]) -> Tensor:
        """Embeddings `[B, L, D]` of the tokens, the tiles' features in place of the context tokens."""
        embeds = self.internvl.get_input_embeddings()(input_ids)
        slots = input_ids == self.internvl.config.image_token_id
        if len(tiles):
            features = self._features(tiles)
            _check_slots(int(slots.sum()), features, names)
            return embeds.masked_scatter(slots.unsqueeze(-1), features.to(embeds.dtype))
        if self.always_run_vision:
            side = tile_size(self.internvl.config)
            blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=embeds.device)
            return embeds + 0.0 * self._features(blank).sum().to(embeds.dtype)
        return embeds

    def _features(self, tiles: Tensor) -> Tensor:
        """Context-token embeddings `[N, tokens per tile, D]` of uint8 tiles `[N, 3, S, S]`."""
        pixels = normalize_tiles(tiles, dtype=self.internvl.dtype)
        return self.internvl.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output

    def generate(self, prompts: PromptBatch, **options: Any) -> Tensor:
        """Greedy continuation of left-padded prompts: new token ids `[B, at most max_new_tokens]`.

        Generation uses the cache and plain attention, unpacked.
        """
        names = [f"{record.file}:{record.line}" for record in prompts.records]
        embeds = self._embed(prompts.input_ids, prompts.pixel_values, names)
        language = self.internvl.model.language_model
        training_attention = language.config._attn_implementation
        language.set_attn_implementation(GENERATION_ATTENTION)
        try:
            # The library types `generate` for other callers than its own classes.
            generate = cast(Callable[..., Tensor], self.internvl.generate)
            return generate(
                inputs_embeds=embeds, attention_mask=prompts.attention_mask, do_sample=False, use_cache=True, **options
            )
        finally:
            language.set_attn_implementation(training_attention)


def _check_slots(slots: int, features: Tensor, names: Sequence[str]) -> None:
    available = features.shape[0] * features.shape[1]
    if slots != available:
        raise ValueError(
            f"{slots} image slots in the text but {available} features from {features.shape[0]} tiles, in one of: "
            f"{', '.join(names)}. The tile settings of data and model differ, or a record holds a literal "
            "image token"
        )
