"""Answers by generation: with the cache, plain attention, unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from transformers import InternVLForConditionalGeneration

from ivl_lightning.inference.embeddings import embed
from ivl_lightning.structures import PromptBatch

GENERATION_ATTENTION = "sdpa"


def generate(
    internvl: InternVLForConditionalGeneration, prompts: PromptBatch, *, always_run_vision: bool = False, **options: Any
) -> Tensor:
    """Continuation of left-padded prompts, greedy unless `options` say otherwise.

    Args:
        internvl: the network; it is given its training attention back afterwards.
        prompts: B questions.
        always_run_vision: see `embed`; sharded ranks need it, of which one may have pictures and another none.
        **options: of the library's `generate` (`max_new_tokens`, `do_sample`, `num_return_sequences`, `streamer`, ...).

    Returns:
        New token ids `[B * num_return_sequences, at most max_new_tokens]`.

    Raises:
        ValueError: tiles and context tokens do not match; names the records.
    """
    names = [f"{record.file}:{record.line}" for record in prompts.records]
    embeds = embed(internvl, prompts.input_ids, prompts.pixel_values, names, always_run_vision=always_run_vision)
    language = internvl.model.language_model
    training_attention = language.config._attn_implementation
    language.set_attn_implementation(GENERATION_ATTENTION)
    try:
        # The library types `generate` for other callers than its own classes.
        run = cast(Callable[..., Tensor], internvl.generate)
        settings = {"do_sample": False, "use_cache": True, **options}
        return run(inputs_embeds=embeds, attention_mask=prompts.attention_mask.to(embeds.device), **settings)
    finally:
        language.set_attn_implementation(training_attention)
