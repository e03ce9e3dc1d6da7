"""QLoRA: the frozen linear layers of the language model's blocks in 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from ivl_lightning.models.lora import linear_layers
from ivl_lightning.models.parts import language_layers

_WEIGHT_PART = ".weight."


def quantize_language_model(internvl: InternVLForConditionalGeneration, device: torch.device) -> None:
    """Exchange the linear layers of the language model's blocks for those of 4-bit weights (NF4, quantized scales).

    They compute in the network's dtype. Biases, norms, embeddings and head stay as they are.

    Args:
        internvl: changed in place, before it gets adapters.
        device: where it quantizes, and where the 4-bit weights are afterwards.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("lora.quantize=nf4 needs bitsandbytes: pip install 'ivl-lightning[qlora]'")
    for block in language_layers(internvl):
        for name in linear_layers(nn.ModuleList([block])):
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, _in_four_bits(linear, internvl.dtype, device))


def _in_four_bits(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    library: Any = importlib.import_module("bitsandbytes.nn")
    with torch.device("meta"):
        layer: Any = library.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
    layer.weight = library.Params4bit(
        linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    if linear.bias is not None:
        layer.bias = linear.bias
    # What it packs anew for inference on some CPUs gives no gradients when training goes on.
    layer.support_avx512bf16_for_cpu = False
    return cast(nn.Module, layer.train(linear.training))


def four_bit_names(state_dict: Iterable[str]) -> dict[str, str]:
    """Names of the 4-bit weights of an adapted network -> their names in the plain network."""
    owners = [name.partition(_WEIGHT_PART)[0] for name in state_dict if _WEIGHT_PART in name]
    return {f"{owner}.weight": f"{owner.removesuffix('.base_layer')}.weight" for owner in owners}


def unquantized(state_dict: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of an adapted 4-bit network with the weights that were there before they were quantized.

    Args:
        state_dict: with `X.base_layer.weight` in 4 bits and what belongs to it under `X.base_layer.weight.`.
        plain: state dict of the network as it was read.
    """
    four_bits = four_bit_names(state_dict)
    return {
        name: plain[four_bits[name]] if name in four_bits else value
        for name, value in state_dict.items()
        # What belongs to a 4-bit weight is named below it.
        if _WEIGHT_PART not in name
    }
