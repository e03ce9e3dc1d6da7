"""LoRA adapters on vision tower and language model, by peft; the network keeps its class."""

from __future__ import annotations

import difflib
import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

from ivl_lightning.config.lora import settings_faults
from ivl_lightning.config.schema import AdaptedPart, LoraSettings
from ivl_lightning.models.freeze import model_parts
from ivl_lightning.models.parts import language_layers, text_config, vision_layers, vision_tower

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OFFICIAL_TARGETS: dict[str, tuple[str, ...]] = {
    "vision": ("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"),
    "qwen2": _LLAMA,
    "llama": _LLAMA,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}
"""Layers that get adapters in the original, under the library's names: of the vision tower, and by `model_type`."""


def lora_scale(settings: LoraSettings) -> float:
    """What the product of an adapter's two matrices is multiplied by: alpha / rank."""
    return _alpha(settings) / settings.rank


def freeze_adapted(internvl: InternVLForConditionalGeneration, settings: LoraSettings) -> None:
    """Take the gradients from the parts that get adapters.

    Raises:
        ValueError: settings that contradict each other, or a network that has adapters already.
    """
    faults = settings_faults(settings) or ([] if settings.parts else ["lora.parts=[] gives no part adapters"])
    if faults:
        raise ValueError("\n".join(faults))
    if _layers(internvl):
        raise ValueError("the network has LoRA adapters already: merge them first, or give a function that builds it")
    for part in settings.parts:
        for module in model_parts(internvl)[part]:
            module.requires_grad_(False)


def add_lora(internvl: InternVLForConditionalGeneration, settings: LoraSettings, *, seed: int = 0) -> None:
    """Freeze the chosen parts and give their linear layers adapters that train; what else trains goes on training.

    Adapters are float32 whatever the network's dtype: their updates are small beside their values. B begins at 0, so
    the network computes what it did before.

    Args:
        internvl: changed in place; it stays an `InternVLForConditionalGeneration`. Its weights may be on the meta
            device; the adapters have their values all the same.
        settings: with one part at least.
        seed: of the first values of A, the same on every rank.

    Raises:
        ValueError: see `freeze_adapted`; or a target that no layer has, with the nearest names.
    """
    freeze_adapted(internvl, settings)
    training = [parameter for parameter in internvl.parameters() if parameter.requires_grad]
    config = _peft().LoraConfig(
        r=settings.rank,
        lora_alpha=_alpha(settings),
        lora_dropout=settings.dropout,
        target_modules="|".join(_pattern(internvl, part, settings) for part in sorted(set(settings.parts))),
        bias="none",
    )
    # On the CPU, so that a seed gives the same numbers wherever the network lies.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _stand_ins(internvl):
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(config, internvl, ADAPTER)
    for parameter in training:
        # The library lets nothing but adapters train.
        parameter.requires_grad_(True)
    for layer in _layers(internvl):
        layer.lora_A.float()
        layer.lora_B.float()


@contextmanager
def _stand_ins(internvl: InternVLForConditionalGeneration) -> Iterator[None]:
    """Linear weights on the meta device as weights on the CPU, of one number each, repeated.

    The library puts an adapter where its layer's weight is, and on the meta device it would lose its values.
    """
    linear = [module for module in internvl.modules() if isinstance(module, nn.Linear) and module.weight.is_meta]
    weights = [module.weight for module in linear]
    for module, weight in zip(linear, weights, strict=True):
        stand_in = torch.empty(1, dtype=weight.dtype, device="cpu").expand(weight.shape)
        module.weight = nn.Parameter(stand_in, requires_grad=weight.requires_grad)
    try:
        yield
    finally:
        for module, weight in zip(linear, weights, strict=True):
            module.weight = weight


def adapter_config(internvl: InternVLForConditionalGeneration) -> LoraConfig:
    """The library's description of the adapters of a network."""
    return cast("dict[str, LoraConfig]", internvl.peft_config)[ADAPTER]


@contextmanager
def adapters_off(internvl: InternVLForConditionalGeneration) -> Iterator[None]:
    """The network without its adapters, which are what they were afterwards; not for what needs a gradient."""
    layers = _layers(internvl)
    _switch(layers, False)
    try:
        yield
    finally:
        _switch(layers, True)


def _switch(layers: Sequence[LoraLayer], enabled: bool) -> None:
    for layer in layers:
        # The library also freezes what it switches off. Weights that FSDP gathers meanwhile would stay frozen.
        training = [(parameter, parameter.requires_grad) for parameter in cast(nn.Module, layer).parameters()]
        layer.enable_adapters(enabled)
        for parameter, requires_grad in training:
            parameter.requires_grad_(requires_grad)


def _layers(internvl: InternVLForConditionalGeneration) -> list[LoraLayer]:
    kind = _peft().tuners.lora.LoraLayer
    return [module for module in internvl.modules() if isinstance(module, kind)]


def _peft() -> ModuleType:
    """The library; imported late, because runs without adapters need not wait for it and for bitsandbytes behind it."""
    # bitsandbytes tells everybody of kernels that could be downloaded.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return importlib.import_module("peft")


def _alpha(settings: LoraSettings) -> int:
    return 2 * settings.rank if settings.alpha is None else settings.alpha


def _pattern(internvl: InternVLForConditionalGeneration, part: AdaptedPart, settings: LoraSettings) -> str:
    """Regular expression of the names of the layers of a part that get adapters."""
    blocks = _blocks(internvl, part)
    place = next(name for name, module in internvl.named_modules() if module is blocks)
    layers = adapted_layers(internvl, part, settings)
    return rf"{re.escape(place)}\.\d+\.({'|'.join(re.escape(layer) for layer in layers)})"


def adapted_layers(internvl: InternVLForConditionalGeneration, part: AdaptedPart, settings: LoraSettings) -> list[str]:
    """Names inside a block of the linear layers of a part that get adapters.

    Raises:
        ValueError: a target that no layer has, with the nearest names.
    """
    kind = "vision" if part == "vision" else text_config(internvl.config).model_type
    layers = linear_layers(_blocks(internvl, part))
    return _chosen(layers, settings.targets.get(part) or OFFICIAL_TARGETS.get(kind), part)


def _blocks(internvl: InternVLForConditionalGeneration, part: AdaptedPart) -> nn.ModuleList:
    return vision_layers(vision_tower(internvl)) if part == "vision" else language_layers(internvl)


def linear_layers(blocks: nn.ModuleList) -> list[str]:
    """Names of the linear layers inside any of the blocks, such as `self_attn.q_proj`; sorted."""
    return sorted({name for block in blocks for name, module in block.named_modules() if isinstance(module, nn.Linear)})


def _chosen(layers: Sequence[str], targets: Sequence[str] | None, part: str) -> list[str]:
    """The layers whose last name, or more of it, is a target; all of them without targets."""
    if targets is None:
        return list(layers)
    for target in targets:
        if not _matching(layers, target):
            raise ValueError(_unknown(target, layers, part))
    return [layer for layer in layers if any(_matching([layer], target) for target in targets)]


def _matching(layers: Sequence[str], target: str) -> list[str]:
    return [layer for layer in layers if f".{layer}".endswith(f".{target}")]


def _unknown(target: str, layers: Sequence[str], part: str) -> str:
    names = sorted({layer.rpartition(".")[2] for layer in layers})
    near = difflib.get_close_matches(target, names, n=3, cutoff=0.4)
    hint = f"nearest are {', '.join(near)}" if near else f"there are {', '.join(names)}"
    return f"lora.targets.{part}: no linear layer of its blocks is named {target}; {hint}"
