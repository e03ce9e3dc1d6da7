"""The language model's last block, whose feed-forward half runs where something is predicted, and nowhere else.

Behind the last attention no token looks at another one, so a row without a supervised token behind it changes no loss
and gets no gradient. In a pack most rows are of that kind: context tokens of tiles, and questions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from ivl_lightning.models.parts import language_layers, text_config


class SelectingLayer(nn.Module):
    """Mixed into the library's block of the same two halves; its state dict is unchanged."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, loss_rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The block's output, of some rows alone.

        Args:
            hidden_states: `[1, L, D]`.
            *args: see the library's block.
            loss_rows: int64 `[n]`, the rows that are wanted; None for all, as in generation.
            **kwargs: see the library's block.

        Returns:
            `[1, n, D]`, or `[1, L, D]` without `loss_rows`.
        """
        if loss_rows is None:
            whole: Tensor = super().forward(hidden_states, *args, **kwargs)
            return whole
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        rows = (hidden_states + attended).index_select(1, loss_rows)
        output: Tensor = rows + self.mlp(self.post_attention_layernorm(rows))
        return output


class SelectingQwen2Layer(SelectingLayer, Qwen2DecoderLayer):
    """Of Qwen2 and Qwen2.5."""


class SelectingLlamaLayer(SelectingLayer, LlamaDecoderLayer):
    """Of Llama, and of InternLM2, which is one here."""


_SELECTING: dict[type[nn.Module], type[SelectingLayer]] = {
    Qwen2DecoderLayer: SelectingQwen2Layer,
    LlamaDecoderLayer: SelectingLlamaLayer,
}


def select_in_last_layer(model: InternVLForConditionalGeneration) -> None:
    """Exchange the last block in place; parameters stay the same objects. Of other families nothing changes."""
    layers = language_layers(model)
    old = layers[-1]
    selecting = _SELECTING.get(type(old))
    if selecting is None:
        return
    with torch.device("meta"):
        layer = selecting(text_config(model.config), len(layers) - 1)
    for name, module in old.named_children():
        setattr(layer, name, module)
    layer.train(old.training)
    layers[-1] = layer


def selects_rows(model: InternVLForConditionalGeneration) -> bool:
    """Whether the language model takes `loss_rows` and returns those rows."""
    return isinstance(language_layers(model)[-1], SelectingLayer)
