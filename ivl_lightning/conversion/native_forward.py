"""A forward pass of the native network with the memory of one layer: weights are read where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ivl_lightning.checkpoints.source import TensorSource
from ivl_lightning.conversion.memory import give_back_memory
from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower
from ivl_lightning.models.streaming import empty_model

_ATTENTION = {"text_config": "sdpa", "vision_config": "sdpa"}


@dataclass(frozen=True, slots=True)
class NativeOutputs:
    """Outputs of a forward pass in float32.

    Attributes:
        image_features: `[N, tokens per tile, D]` after the projector; None without tiles.
        logits: `[L, vocabulary]`.
    """

    image_features: Tensor | None
    logits: Tensor


def streamed_forward(
    source: TensorSource,
    config: InternVLConfig,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    *,
    image_token_id: int | None = None,
) -> NativeOutputs:
    """Run a checkpoint of any size.

    Args:
        source: with native names.
        config: its shapes.
        input_ids: `[L]`, one document.
        pixel_values: normalized tiles `[N, 3, S, S]`, or None for text alone.
        image_token_id: see `forward`.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    model = empty_model(config, dtype=torch.float32, attention=_ATTENTION).eval()
    with torch.no_grad(), _read_where_used(model, source):
        return forward(model, input_ids, pixel_values, image_token_id=image_token_id)


def forward(
    model: InternVLForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    *,
    image_token_id: int | None = None,
) -> NativeOutputs:
    """One document through a model, part by part, as its own forward does.

    Args:
        model: in evaluation mode, float32.
        input_ids: `[L]`.
        pixel_values: `[N, 3, S, S]`, or None.
        image_token_id: of the tokens whose embeddings the features replace; None takes the configuration's.
    """
    embeddings = model.get_input_embeddings()(input_ids[None])
    features = None
    if pixel_values is not None:
        features = model.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        slot = model.config.image_token_id if image_token_id is None else image_token_id
        embeddings = embeddings.masked_scatter((input_ids[None] == slot).unsqueeze(-1), features)
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return NativeOutputs(features, model.lm_head(hidden)[0])


@contextmanager
def _read_where_used(model: InternVLForConditionalGeneration, source: TensorSource) -> Iterator[None]:
    """Give each unit its weights before it runs, and take them away behind it."""
    with ExitStack() as hooks:
        for name, unit in _units(model):
            unit_source = _Unit(name, unit, source)
            hooks.callback(unit.register_forward_pre_hook(unit_source.load).remove)
            hooks.callback(unit.register_forward_hook(unit_source.unload).remove)
        yield


def _units(model: InternVLForConditionalGeneration) -> list[tuple[str, nn.Module]]:
    """Modules that have weights and run by themselves: blocks, and what has weights outside of blocks."""
    blocks = {*vision_layers(vision_tower(model)), *language_layers(model)}
    found: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        if module in blocks or next(module.parameters(recurse=False), None) is not None:
            found.append((name, module))
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found


class _Unit:
    def __init__(self, name: str, module: nn.Module, source: TensorSource) -> None:
        self._names = {leaf: f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        self._source = source

    def load(self, module: nn.Module, _: Any) -> None:
        for leaf, name in self._names.items():
            self._set(module, leaf, self._source.read(name).float())

    def unload(self, module: nn.Module, *_: Any) -> None:
        for leaf, value in list(module.named_parameters()):
            self._set(module, leaf, value.detach().to("meta"))
        give_back_memory()

    @staticmethod
    def _set(module: nn.Module, leaf: str, value: Tensor) -> None:
        owner, _, last = leaf.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
