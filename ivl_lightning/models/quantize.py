"""QLoRA: the frozen linear layers of the language model's blocks in 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from ivl_lightning.models.lora import linear_layers
from ivl_lightning.models.parts import language_layers


def quantize_language_model(internvl: InternVLForConditionalGeneration, device: torch.device) -> None:
    """Exchange the linear layers of the language model's blocks for layers of 4-bit weights (NF4, scales quantized too).

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
    # Imported late: an extra.
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
    layer.weight = Params4bit(
        linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    if linear.bias is not None:
        layer.bias = linear.bias
    # What it packs anew for inference on some CPUs gives no gradients when training goes on.
    layer.support_avx512bf16_for_cpu = False
    return layer.train(linear.training)


def unquantized(state_dict: dict[str, Tensor], plain: InternVLForConditionalGeneration) -> dict[str, Tensor]:
    """A state dict of an adapted 4-bit network with the weights that were there before they were quantized.

    Args:
        state_dict: with `X.base_layer.weight` in 4 bits and what belongs to it under `X.base_layer.weight.`.
        plain: the network as it was read, not quantized.
    """
    weights = plain.state_dict()
    quantized = {name.rpartition(".quant_state.")[0] for name in state_dict if ".quant_state." in name}
    return {}


def parameter_count(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for; two of them share a byte of a 4-bit one."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
