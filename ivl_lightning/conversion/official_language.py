"""Reference forward pass of the original's four language models, on tensors of the original layout.

Source of the rules: `modeling_internlm2.py` and `modeling_phi3.py` of OpenGVLab/InternVL, commit 2410d1d, and for Llama
and Qwen2 the transformers library 4.37.2, which that commit runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ivl_lightning.conversion.official_primitives import (
    Read,
    Section,
    UnsupportedError,
    attend,
    join_heads,
    linear_at,
    rms_norm_at,
    split_heads,
)
from ivl_lightning.conversion.official_rotary import (
    Scaling,
    dynamic,
    interpolated,
    llama3,
    longrope,
    rotate,
    rotation,
)

# In float32 the output head of a large vocabulary is larger than a layer.
_HEAD_ROWS = 16384

_Project = Callable[[Read, Section, str, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Normed hidden states `[L, H]` to q `[L, heads * d]`, k and v `[L, kv heads * d]`; the string is the layer's name."""
_FeedForward = Callable[[Read, Section, str, Tensor], Tensor]


def embed(read: Read, config: Mapping[str, Any], input_ids: Tensor) -> Tensor:
    """Token embeddings `[L, H]` of ids `[L]`.

    Args:
        read: gives tensors by their original names.
        config: the parsed original config.json.
        input_ids: `[L]`.

    Raises:
        UnsupportedError: an unknown language model class.
    """
    family, _ = _language_model(config)
    # Rows first: the whole table need not exist in float32.
    return read(f"language_model.{family.embeddings}.weight")[input_ids].float()


def language_forward(read: Read, config: Mapping[str, Any], embeddings: Tensor) -> Tensor:
    """Logits of one document at positions 0 to L - 1, with causal attention.

    Args:
        read: gives tensors by their original names.
        config: the parsed original config.json.
        embeddings: `[L, H]`, float32, image features in place.

    Returns:
        `[L, vocabulary]`, float32.

    Raises:
        UnsupportedError: a setting without a rule here.
    """
    family, settings = _language_model(config)
    _check(family, settings, len(embeddings))
    _, _, head_dim = _sizes(settings)
    turns = rotation(settings, family.scalings, len(embeddings), head_dim, embeddings.device)
    hidden = embeddings
    for index in range(settings["num_hidden_layers"]):
        hidden = _layer(read, family, settings, f"language_model.model.layers.{index}", hidden, turns)
    hidden = rms_norm_at(read, "language_model.model.norm", hidden, settings["rms_norm_eps"])
    head = read(f"language_model.{family.head}.weight")
    return torch.cat([linear(hidden, rows.float()) for rows in head.split(_HEAD_ROWS)], dim=-1)


def _project_separate(read: Read, layer: str, x: Tensor, *, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        linear_at(read, f"{layer}.self_attn.q_proj", x, bias=bias),
        linear_at(read, f"{layer}.self_attn.k_proj", x, bias=bias),
        linear_at(read, f"{layer}.self_attn.v_proj", x, bias=bias),
    )


def _project_qwen2(read: Read, settings: Section, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _project_separate(read, layer, x, bias=True)


def _project_llama(read: Read, settings: Section, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _project_separate(read, layer, x, bias=settings["attention_bias"])


def _project_internlm2(read: Read, settings: Section, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Outputs are grouped by key head: its query heads, then the key head itself, then its value head.
    _, key_heads, head_dim = _sizes(settings)
    fused = linear_at(read, f"{layer}.attention.wqkv", x, bias=settings["bias"])
    groups = fused.unflatten(-1, (key_heads, -1, head_dim))
    return groups[:, :, :-2].flatten(1), groups[:, :, -2].flatten(1), groups[:, :, -1].flatten(1)


def _project_phi3(read: Read, settings: Section, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, key_heads, head_dim = _sizes(settings)
    fused = linear_at(read, f"{layer}.self_attn.qkv_proj", x, bias=False)
    query, key, value = fused.split([heads * head_dim, key_heads * head_dim, key_heads * head_dim], dim=-1)
    return query, key, value


def _feed_forward(read: Read, settings: Section, layer: str, x: Tensor) -> Tensor:
    gate = settings.activation()(linear_at(read, f"{layer}.mlp.gate_proj", x, bias=False))
    up = linear_at(read, f"{layer}.mlp.up_proj", x, bias=False)
    return linear_at(read, f"{layer}.mlp.down_proj", gate * up, bias=False)


def _feed_forward_internlm2(read: Read, settings: Section, layer: str, x: Tensor) -> Tensor:
    gate = settings.activation()(linear_at(read, f"{layer}.feed_forward.w1", x, bias=False))
    up = linear_at(read, f"{layer}.feed_forward.w3", x, bias=False)
    return linear_at(read, f"{layer}.feed_forward.w2", gate * up, bias=False)


def _feed_forward_phi3(read: Read, settings: Section, layer: str, x: Tensor) -> Tensor:
    gate, up = linear_at(read, f"{layer}.mlp.gate_up_proj", x, bias=False).chunk(2, dim=-1)
    return linear_at(read, f"{layer}.mlp.down_proj", settings.activation()(gate) * up, bias=False)


# Common to the four classes. No number of key heads means as many as query heads.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True, slots=True)
class _Family:
    """One class of language model: names below `language_model.`, or below a layer, and rules.

    `required` are settings with the one value that there is a rule for. `output_bias` names the setting that says
    whether attention's output projection has a bias; without a name it has none. `window` names the setting that limits
    how far back a position sees.
    """

    project: _Project
    scalings: Mapping[str, Scaling]
    feed_forward: _FeedForward = _feed_forward
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    embeddings: str = "model.embed_tokens"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    output: str = "self_attn.o_proj"
    output_bias: str | None = None
    feed_forward_norm: str = "post_attention_layernorm"
    window: str | None = None


_FAMILIES = {
    # Defaults: class `Qwen2Config` of transformers 4.37.2. That version takes no notice of rope_scaling, later ones do:
    # only a kind that changes nothing is free of doubt.
    "Qwen2ForCausalLM": _Family(
        project=_project_qwen2,
        scalings={"dynamic": dynamic},
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False},
        required={"use_sliding_window": False},
    ),
    # Defaults: class `LlamaConfig` of transformers 4.37.2; mlp_bias and llama3 are of later versions.
    "LlamaForCausalLM": _Family(
        project=_project_llama,
        scalings={"dynamic": dynamic, "linear": interpolated, "llama3": llama3},
        defaults={"attention_bias": False, "mlp_bias": False},
        required={"mlp_bias": False},
        output_bias="attention_bias",
    ),
    # Defaults: class `InternLM2Config` of `configuration_internlm2.py`.
    "InternLM2ForCausalLM": _Family(
        project=_project_internlm2,
        scalings={"dynamic": dynamic, "linear": interpolated},
        feed_forward=_feed_forward_internlm2,
        defaults={"bias": True, "rope_pos_id_version": "default"},
        required={"rope_pos_id_version": "default"},
        embeddings="model.tok_embeddings",
        head="output",
        attention_norm="attention_norm",
        output="attention.wo",
        output_bias="bias",
        feed_forward_norm="ffn_norm",
    ),
    # Defaults: class `Phi3Config` of `configuration_phi3.py`.
    "Phi3ForCausalLM": _Family(
        project=_project_phi3,
        scalings={"su": longrope, "longrope": longrope},
        feed_forward=_feed_forward_phi3,
        defaults={
            "hidden_size": 3072,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        window="sliding_window",
    ),
}


def _language_model(config: Mapping[str, Any]) -> tuple[_Family, Section]:
    given = config["llm_config"]
    name = next(iter(given.get("architectures") or ()), None)
    if name not in _FAMILIES:
        raise UnsupportedError("llm_config.architectures[0]", name, ", ".join(_FAMILIES))
    family = _FAMILIES[name]
    return family, Section("llm_config.", given, {**_DEFAULTS, **family.defaults})


def _check(family: _Family, settings: Section, length: int) -> None:
    # rope_parameters is where later versions of transformers keep rope_theta, which would be missed.
    for name, value in {"rope_parameters": None, "partial_rotary_factor": 1.0, **family.required}.items():
        settings.one_of(name, value)
    window = settings[family.window] if family.window else None
    if window is not None and window < length:
        raise UnsupportedError(f"{settings.path}{family.window}", window, f"windows of at least the {length} tokens")


def _sizes(settings: Section) -> tuple[int, int, int]:
    heads = settings["num_attention_heads"]
    return heads, settings["num_key_value_heads"] or heads, settings["head_dim"] or settings["hidden_size"] // heads


def _layer(
    read: Read, family: _Family, settings: Section, name: str, x: Tensor, turns: tuple[Tensor, Tensor]
) -> Tensor:
    eps = settings["rms_norm_eps"]
    normed = rms_norm_at(read, f"{name}.{family.attention_norm}", x, eps)
    mixed = _attention(settings, family.project(read, settings, name, normed), turns)
    bias = settings[family.output_bias] if family.output_bias else False
    x = x + linear_at(read, f"{name}.{family.output}", mixed, bias=bias)
    return x + family.feed_forward(
        read, settings, name, rms_norm_at(read, f"{name}.{family.feed_forward_norm}", x, eps)
    )


def _attention(settings: Section, projected: tuple[Tensor, Tensor, Tensor], turns: tuple[Tensor, Tensor]) -> Tensor:
    heads, key_heads, _ = _sizes(settings)
    query, key, value = projected
    query, key = rotate(split_heads(query, heads), *turns), rotate(split_heads(key, key_heads), *turns)
    # Query head h looks at key head h // (heads / key heads).
    shared = heads // key_heads
    key, value = (x.repeat_interleave(shared, dim=0) for x in (key, split_heads(value, key_heads)))
    return join_heads(attend(query, key, value, causal=True))
