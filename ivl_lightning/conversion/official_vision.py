"""Reference forward pass of InternViT, pixel shuffle and projector, on tensors of the original layout.

Source of the rules: `modeling_intern_vit.py` and `modeling_internvl_chat.py` of OpenGVLab/InternVL, commit 2410d1d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm

from ivl_lightning.conversion.official_primitives import (
    Read,
    Section,
    UnsupportedError,
    attend,
    join_heads,
    linear_at,
    read_float,
    rms_norm_at,
    split_heads,
)

# Class `InternVisionConfig` of `configuration_intern_vit.py`: the 6B tower at 224 pixels.
_VISION_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "num_attention_heads": 25,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
}
# Class `InternVLChatConfig` of `configuration_internvl_chat.py`. The original's trainer has another default for
# ps_version, v2, but a config.json is read through this class.
_CHAT_DEFAULTS: dict[str, Any] = {
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "ps_version": "v1",
    "use_backbone_lora": 0,
}


def vision_forward(read: Read, config: Mapping[str, Any], pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles through the tower; the selected layer's patches through pixel shuffle and projector.

    Args:
        read: gives tensors by their original names.
        config: the parsed original config.json.
        pixel_values: `[N, 3, S, S]` normalized tiles.

    Returns:
        Hidden states of the last layer `[N, 1 + patches, C]`, class token first, without a norm, and image features
        `[N, tokens per tile, H]`. The features come from `hidden_states[select_layer]`, which counts the embeddings
        as the first of layers + 1 entries.

    Raises:
        UnsupportedError: a setting without a rule here.
        ValueError: the position table has another size than the config says.
    """
    chat = Section("", config, _CHAT_DEFAULTS)
    chat.one_of("use_backbone_lora", 0)
    settings = Section("vision_config.", config["vision_config"], _VISION_DEFAULTS)
    layers = settings["num_hidden_layers"]
    factor, version = _factor(chat), chat.one_of("ps_version", "v1", "v2")
    chosen = range(layers + 1)[chat.one_of("select_layer", *range(-layers - 1, layers + 1))]
    hidden = _embeddings(read, settings, pixel_values.float())
    selected = hidden
    for index in range(layers):
        hidden = _layer(read, settings, f"vision_model.encoder.layers.{index}", hidden)
        if index + 1 == chosen:
            selected = hidden
    return hidden, _projector(read, pixel_shuffle(selected[:, 1:], factor, version))


def pixel_shuffle(patches: Tensor, factor: int, version: str) -> Tensor:
    """Square blocks of patches become tokens.

    Token (i, j) holds the patches (f i + a, f j + b), one channel block each, ordered by a, then b. v2 counts the
    tokens row by row, t = i * columns + j; v1 leaves the axes swapped, t = j * rows + i.

    Args:
        patches: `[N, patches, C]`, row by row on a square grid, without class token.
        factor: f, patches of a token's side.
        version: `v1` or `v2`.

    Returns:
        `[N, patches / f^2, f^2 C]`.

    Raises:
        UnsupportedError: f does not divide the grid.
    """
    side = round(patches.shape[1] ** 0.5)
    if side % factor:
        raise UnsupportedError("downsample_ratio", 1 / factor, f"a ratio that divides a grid of {side} patches")
    tokens = side // factor
    blocks = patches.unflatten(1, (tokens, factor, tokens, factor))  # n, i, a, j, b, channel
    order = (0, 3, 1, 2, 4, 5) if version == "v1" else (0, 1, 3, 2, 4, 5)
    return blocks.permute(order).flatten(3).flatten(1, 2)


def _factor(chat: Section) -> int:
    ratio = chat["downsample_ratio"]
    factor = round(1 / ratio)
    if abs(factor * ratio - 1) > 1e-6:
        raise UnsupportedError("downsample_ratio", ratio, "1, 1/2, 1/3 and so on")
    return factor


def _projector(read: Read, tokens: Tensor) -> Tensor:
    # mlp1: 0 LayerNorm with torch's own epsilon, 1 Linear, 2 exact GELU, 3 Linear.
    weight, bias = read_float(read, "mlp1.0.weight"), read_float(read, "mlp1.0.bias")
    normed = layer_norm(tokens, weight.shape, weight, bias, eps=1e-5)
    return linear_at(read, "mlp1.3", gelu(linear_at(read, "mlp1.1", normed, bias=True)), bias=True)


def _embeddings(read: Read, settings: Section, pixel_values: Tensor) -> Tensor:
    name = "vision_model.embeddings"
    weight, bias = read_float(read, f"{name}.patch_embedding.weight"), read_float(read, f"{name}.patch_embedding.bias")
    grid = conv2d(pixel_values, weight, bias, stride=settings["patch_size"])
    class_token = read_float(read, f"{name}.class_embedding").expand(len(grid), 1, -1)
    positions = _positions(read_float(read, f"{name}.position_embedding"), settings, grid.shape[-1])
    return torch.cat([class_token, grid.flatten(2).transpose(1, 2)], dim=1) + positions


def _positions(table: Tensor, settings: Section, side: int) -> Tensor:
    trained = settings["image_size"] // settings["patch_size"]
    if table.shape[1] != 1 + trained**2:
        raise ValueError(
            f"vision_config.image_size={settings['image_size']} wants {1 + trained**2} positions; "
            f"vision_model.embeddings.position_embedding has {table.shape[1]}"
        )
    # Done at the trained size too, where it changes nothing, as in the original.
    patches = table[:, 1:].transpose(1, 2).unflatten(2, (trained, trained))
    resized = interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def _layer(read: Read, settings: Section, name: str, x: Tensor) -> Tensor:
    mixed = _attention(read, settings, f"{name}.attn", _norm(read, settings, f"{name}.norm1", x))
    x = x + read_float(read, f"{name}.ls1") * mixed
    wide = linear_at(read, f"{name}.mlp.fc1", _norm(read, settings, f"{name}.norm2", x), bias=True)
    narrow = linear_at(read, f"{name}.mlp.fc2", settings.activation()(wide), bias=True)
    return x + read_float(read, f"{name}.ls2") * narrow


def _norm(read: Read, settings: Section, name: str, x: Tensor) -> Tensor:
    eps = settings["layer_norm_eps"]
    if settings.one_of("norm_type", "rms_norm", "layer_norm") == "rms_norm":
        return rms_norm_at(read, name, x, eps)
    weight, bias = read_float(read, f"{name}.weight"), read_float(read, f"{name}.bias")
    return layer_norm(x, weight.shape, weight, bias, eps)


def _attention(read: Read, settings: Section, name: str, x: Tensor) -> Tensor:
    query, key, value = linear_at(read, f"{name}.qkv", x, bias=settings["qkv_bias"]).chunk(3, dim=-1)
    if settings["qk_normalization"]:
        # Over the full width, before there are heads.
        query = rms_norm_at(read, f"{name}.q_norm", query, settings["layer_norm_eps"])
        key = rms_norm_at(read, f"{name}.k_norm", key, settings["layer_norm_eps"])
    heads = settings["num_attention_heads"]
    mixed = attend(split_heads(query, heads), split_heads(key, heads), split_heads(value, heads), causal=False)
    return linear_at(read, f"{name}.proj", join_heads(mixed), bias=True)
