"""The modules that run a whole micro-batch: tiles and tokens in, what the loss needs out.

One of them is the root of FSDP. Everything that touches a parameter happens inside its forward (or inside its
registered `generate`), because outside of it parameters are shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from ivl_lightning.inference.embeddings import embed
from ivl_lightning.inference.generate import generate
from ivl_lightning.losses.logps import chunked_logps
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.attention import boundaries, shared_prefix_boundaries
from ivl_lightning.models.last_layer import selects_rows
from ivl_lightning.structures import PackedBatch, PreferenceBatch, PromptBatch


class InternVLRoot(nn.Module):
    """Vision tower, projector and language model over a packed row.

    Args:
        internvl: the network.
        always_run_vision: run the vision tower on a blank tile where a micro-batch has none, so that every rank takes
            part in the same collectives and every trainable parameter gets a gradient. Its features count for nothing.
    """

    def __init__(self, internvl: InternVLForConditionalGeneration, *, always_run_vision: bool = False) -> None:
        super().__init__()
        self.internvl = internvl
        self.always_run_vision = always_run_vision

    def hidden_states(self, batch: PackedBatch | PreferenceBatch) -> Tensor:
        """Last hidden states `[1, L, D]` of the packed row.

        Raises:
            ValueError: tiles and context tokens do not match; names the records.
        """
        return self._run(batch)

    def loss_states(self, batch: PackedBatch | PreferenceBatch) -> Tensor:
        """Last hidden states `[n, D]` that predict a supervised token; the last block leaves out what it can.

        Raises:
            ValueError: tiles and context tokens do not match; names the records.
        """
        if selects_rows(self.internvl):
            return self._run(batch, loss_rows=batch.loss_rows)[0]
        return self._run(batch)[0].index_select(0, batch.loss_rows)

    def _run(self, batch: PackedBatch | PreferenceBatch, **options: Tensor) -> Tensor:
        embeds = embed(
            self.internvl,
            batch.input_ids,
            batch.pixel_values,
            batch.sample_ids,
            always_run_vision=self.always_run_vision,
        )
        if isinstance(batch, PackedBatch):
            attention = boundaries(batch.cu_seqlens, embeds.device)
        else:
            attention = shared_prefix_boundaries(batch.cu_queries, batch.cu_keys, batch.key_rows, embeds.device)
        return self.internvl.model.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False, **attention, **options
        ).last_hidden_state

    def generate(self, prompts: PromptBatch, **options: Any) -> Tensor:
        """New token ids for each prompt; see `inference.generate`."""
        return generate(self.internvl, prompts, always_run_vision=self.always_run_vision, **options)


class InternVLWithLoss(InternVLRoot):
    """The network, selection of supervised rows and the next-token loss head, in one forward.

    Args:
        internvl: the network.
        head: the loss head.
        always_run_vision: see `InternVLRoot`.
    """

    def __init__(
        self, internvl: InternVLForConditionalGeneration, head: NextTokenLoss, *, always_run_vision: bool = False
    ) -> None:
        super().__init__(internvl, always_run_vision=always_run_vision)
        self.head = head

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Weighted loss sum S (scalar) and unweighted token losses `[n]` of a micro-batch.

        Raises:
            ValueError: tiles and context tokens do not match; names the records.
        """
        rows = self.loss_states(batch)
        return self.head(rows, self.internvl.lm_head.weight, batch.loss_targets, batch.loss_weights)


class InternVLWithLogps(InternVLRoot):
    """The network, selection of supervised rows and their log-probabilities, in one forward.

    Args:
        internvl: the network.
        chunk_rows: supervised tokens whose logits exist at one time.
        always_run_vision: see `InternVLRoot`.
    """

    def __init__(
        self, internvl: InternVLForConditionalGeneration, *, chunk_rows: int = 4096, always_run_vision: bool = False
    ) -> None:
        super().__init__(internvl, always_run_vision=always_run_vision)
        self.chunk_rows = chunk_rows

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Log-probabilities of the responses, summed over their tokens: `[D, 2]` float32, chosen and rejected.

        Raises:
            ValueError: tiles and context tokens do not match; names the records.
        """
        rows = self.loss_states(batch)
        logps = chunked_logps(rows, self.internvl.lm_head.weight, batch.loss_targets, self.chunk_rows)
        sums = logps.new_zeros(2 * batch.num_pairs).index_add(0, batch.loss_responses, logps)
        # No view: FSDP puts its backward hook on what the root returns.
        return torch.stack((sums[0::2], sums[1::2]), dim=1)
