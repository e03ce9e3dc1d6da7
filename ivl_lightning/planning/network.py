"""How large a network is: parameters by part and by unit, counted on the real modules, which get no memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ivl_lightning.config.schema import LoraSettings, Part
from ivl_lightning.models.attention import PACKED_ATTENTION
from ivl_lightning.models.build import VISION_ATTENTION
from ivl_lightning.models.freeze import model_parts, set_trainable
from ivl_lightning.models.last_layer import select_in_last_layer, selects_rows
from ivl_lightning.models.lora import adapted_layers
from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower
from ivl_lightning.models.streaming import empty_model

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits, with a byte for 64 of them and a float32 for 256 of those bytes."""

_ADAPTER_BYTES = 4
"""Adapters are float32 whatever the network is."""


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of a module, and the bytes they are stored in.

    Attributes:
        total, trainable: numbers.
        stored, trained: bytes of all, and of those that train.
        largest: numbers of the largest trainable tensor.
    """

    total: int = 0
    trainable: int = 0
    stored: float = 0.0
    trained: float = 0.0
    largest: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.total + other.total,
            self.trainable + other.trainable,
            self.stored + other.stored,
            self.trained + other.trained,
            max(self.largest, other.largest),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedNetwork:
    """What the work of a step depends on.

    Attributes:
        shapes: the network's configuration.
        full: parts whose own weights train.
        adapted: parts with adapters.
        selects_rows: whether half of the last block runs on supervised rows alone.
    """

    shapes: InternVLConfig
    full: frozenset[Part]
    adapted: frozenset[Part]
    selects_rows: bool

    @property
    def trainable_parts(self) -> frozenset[Part]:
        """Parts that train, in full or through adapters."""
        return self.full | self.adapted


@dataclass(frozen=True, slots=True, kw_only=True)
class Network(TrainedNetwork):
    """Sizes of a network of which some parts train.

    Attributes:
        parts: by part; adapters belong to theirs.
        language_block, vision_block: the largest block of each.
        plain: bytes of the plain network in the stored type, as final weights are written.
        vision_layers: blocks of the tower that a backward pass goes through.
        rank: of the adapters; 0 without.
    """

    parts: dict[Part, Count]
    language_block: Count
    vision_block: Count
    plain: float
    vision_layers: int
    rank: int

    @property
    def whole(self) -> Count:
        """The network."""
        return sum(self.parts.values(), Count())


def plan_network(
    shapes: InternVLConfig,
    trainable: Sequence[Part],
    *,
    dtype: str = "float32",
    last_vision_layers: int | None = None,
    lora: LoraSettings | None = None,
) -> Network:
    """Count a network as a stage would build it.

    Args:
        shapes: its configuration, with the vocabulary it will have.
        trainable: parts that get gradients, in full or through adapters.
        dtype: of the stored weights.
        last_vision_layers: of a trainable tower only the last n layers train.
        lora: adapters.

    Raises:
        ValueError: parts or layers that do not exist.
        CheckpointError: no network can be built from the configuration.
    """
    lora = lora or LoraSettings()
    model = empty_model(
        shapes,
        dtype=getattr(torch, dtype),
        attention={"text_config": PACKED_ATTENTION, "vision_config": VISION_ATTENTION},
    )
    select_in_last_layer(model)
    set_trainable(model, trainable, last_vision_layers=last_vision_layers)
    plain = float(sum(value.nbytes for value in model.parameters()))
    for part in lora.parts:
        for module in model_parts(model)[part]:
            module.requires_grad_(False)
    blocks: dict[Part, nn.ModuleList] = {"vision": vision_layers(vision_tower(model)), "llm": language_layers(model)}
    adapters: dict[Part, list[str]] = {part: adapted_layers(model, part, lora) for part in lora.parts}
    counted = {part: _count_blocks(blocks[part], adapters.get(part, ()), lora, part) for part in blocks}
    parts = {part: _outside(modules, blocks.get(part)) for part, modules in model_parts(model).items()}
    return Network(
        shapes=shapes,
        parts={part: sum(counted.get(part, ()), count) for part, count in parts.items()},
        language_block=max(counted["llm"], key=lambda count: count.total),
        vision_block=max(counted["vision"], key=lambda count: count.total),
        plain=plain,
        vision_layers=_layers_of_backward(model, lora),
        full=frozenset(trainable) - frozenset(lora.parts),
        adapted=frozenset(lora.parts),
        rank=lora.rank if lora.parts else 0,
        selects_rows=selects_rows(model),
    )


def _count_blocks(blocks: nn.ModuleList, adapted: Sequence[str], lora: LoraSettings, part: Part) -> list[Count]:
    quantized = part == "llm" and lora.quantize is not None
    return [_block(block, adapted, lora.rank, quantized=quantized) for block in blocks]


def _block(block: nn.Module, adapted: Sequence[str], rank: int, *, quantized: bool) -> Count:
    linear = {f"{name}.weight" for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    count = sum((_tensor(value, quantized and name in linear) for name, value in block.named_parameters()), Count())
    for name in adapted:
        layer = block.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        for size in (rank * layer.in_features, rank * layer.out_features):
            count += Count(size, size, size * _ADAPTER_BYTES, size * _ADAPTER_BYTES, size)
    return count


def _tensor(value: nn.Parameter, quantized: bool = False) -> Count:
    number, stored = value.numel(), value.numel() * NF4_BYTES if quantized else float(value.nbytes)
    if not value.requires_grad:
        return Count(number, 0, stored)
    return Count(number, number, stored, stored, number)


def _outside(modules: Iterable[nn.Module], blocks: nn.ModuleList | None) -> Count:
    """What of a part is in none of its blocks."""
    inside = set() if blocks is None else set(map(id, blocks.parameters()))
    values = (value for module in modules for value in module.parameters() if id(value) not in inside)
    return sum(map(_tensor, values), Count())


def _layers_of_backward(model: InternVLForConditionalGeneration, lora: LoraSettings) -> int:
    """Blocks of the tower from the first one that trains."""
    tower = vision_tower(model)
    blocks = vision_layers(tower)
    if "vision" in lora.parts or any(value.requires_grad for value in tower.embeddings.parameters()):
        return len(blocks)
    return sum(any(value.requires_grad for value in block.parameters()) for block in blocks)
