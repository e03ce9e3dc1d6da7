"""The table of settings between the original's config.json and transformers' configurations, with their defaults.

Source: `configuration_internvl_chat.py`, `configuration_intern_vit.py` and `configuration_internlm2.py` of the
original, and transformers 4.37 for the language models it takes from there. A default of a class is not always that
of the releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ivl_lightning.checkpoints.key_map import INTERNLM2, PHI3

IMAGE_SETTINGS: Final = (
    "template",
    "ps_version",
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "pad2square",
)
"""Of the original's config.json: what is a matter of prompts and pictures, whatever the language model."""

RELEASED_SETTINGS: Final[Mapping[str, Any]] = {
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "pad2square": False,
}
CLASS_SETTINGS: Final[Mapping[str, Any]] = {
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
}

MODEL_TYPES: Final = {
    INTERNLM2: "llama",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    PHI3: "phi3",
}
REQUIRED: Final = object()
NULLABLE: Final = ("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id")


class Field(NamedTuple):
    """A setting in both configurations, and what the original's class takes where its file leaves it out."""

    original: str
    native: str
    default: Any = None


def same(name: str, default: Any = None) -> Field:
    """A field of the same name in both."""
    return Field(name, name, default)


VISION_FIELDS: Final = (
    same("num_channels", 3),
    same("hidden_size", 3200),
    same("num_attention_heads", 25),
    same("intermediate_size", 12800),
    same("num_hidden_layers", 48),
    same("hidden_act", "gelu"),
    same("norm_type", "rms_norm"),
    same("layer_norm_eps", 1e-6),
    same("attention_dropout", 0.0),
    same("initializer_range", 0.02),
    same("patch_size", 14),
    same("image_size", 224),
    Field("qkv_bias", "attention_bias", False),
    Field("qk_normalization", "use_qk_norm", True),
    Field("dropout", "hidden_dropout_prob", 0.0),
    Field("initializer_factor", "layer_scale_init_value", 0.1),
)

LANGUAGE_FIELDS: Final = (
    same("vocab_size", REQUIRED),
    same("hidden_size", REQUIRED),
    same("intermediate_size", REQUIRED),
    same("num_hidden_layers", REQUIRED),
    same("num_attention_heads", REQUIRED),
    same("num_key_value_heads"),
    same("hidden_act", "silu"),
    same("max_position_embeddings", 2048),
    same("initializer_range", 0.02),
    same("rms_norm_eps", 1e-6),
    same("bos_token_id"),
    same("eos_token_id"),
    same("pad_token_id"),
)
OWN_FIELDS: Final[Mapping[str, tuple[Field, ...]]] = {
    INTERNLM2: (
        Field("bias", "attention_bias", True),
        same("bos_token_id", 1),
        same("eos_token_id", 2),
        same("pad_token_id", 0),
    ),
    "Qwen2ForCausalLM": (
        same("max_position_embeddings", 32768),
        same("attention_dropout", 0.0),
        same("use_sliding_window", False),
        same("sliding_window", 4096),
        same("max_window_layers", 28),
    ),
    "LlamaForCausalLM": (
        same("attention_bias", False),
        same("attention_dropout", 0.0),
        same("head_dim"),
        same("bos_token_id", 1),
        same("eos_token_id", 2),
    ),
    PHI3: (
        same("max_position_embeddings", 4096),
        same("rms_norm_eps", 1e-5),
        same("attention_dropout", 0.0),
        same("resid_pdrop", 0.0),
        same("embd_pdrop", 0.0),
        same("original_max_position_embeddings", 4096),
        same("sliding_window"),
    ),
}
ROPE_NAMES: Final = {"su": "longrope"}
