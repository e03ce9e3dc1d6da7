"""Checkpoints in the original's layout: the two golden ones, and small ones of every family with random weights.

Names and shapes are written down by hand from the original's modeling code, apart from the project's own key table.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ivl_lightning.config.convert import ConvertConfig

CHECKPOINTS = Path(__file__).parent / "fixtures/checkpoints"
GOLDEN = ("qwen2_vit300m", "internlm2_vit300m")
TOKENIZER_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)

Config = dict[str, Any]


@dataclass(frozen=True)
class Golden:
    """A recorded checkpoint, its inputs, and what came out of the original's own code."""

    folder: Path
    config: Config
    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor]
    reference: dict[str, Tensor]
    gradients: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def image_token_id(self) -> int:
        """Of `<IMG_CONTEXT>`."""
        return int(self.meta["img_context_token_id"])


@cache
def golden(name: str) -> Golden:
    folder = CHECKPOINTS / name
    arrays = (
        {key: torch.from_numpy(value) for key, value in np.load(folder / f"{kind}.npz").items()}
        for kind in ("inputs", "reference", "grads")
    )
    meta = json.loads((folder / "meta.json").read_text())
    return Golden(folder, read_config(folder), load_file(folder / "model.safetensors"), *arrays, meta)


def read_config(folder: Path) -> Config:
    return json.loads((folder / "config.json").read_text())


# Tower in the style of the 300M one, and of the 6B one, whose settings are the original class's defaults.
_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 56,
    "patch_size": 14,
}
VIT_300M = {
    **_VISION,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
    "initializer_factor": 1.0,
}
VIT_6B = dict(_VISION)
_LANGUAGE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 450,
}
QWEN2 = {**_LANGUAGE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA = {**_LANGUAGE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500.0}
INTERNLM2 = {
    **_LANGUAGE,
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "bias": False,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
}
PHI3 = {
    **_LANGUAGE,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 32,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 8.0, 16.0],
    },
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen2_300m": (VIT_300M, QWEN2),
    "qwen2_6b": (VIT_6B, QWEN2),
    "internlm2_6b": (VIT_6B, INTERNLM2),
    "llama_6b": (VIT_6B, LLAMA),
    "phi3_300m": (VIT_300M, PHI3),
}


def family_config(name: str, **changes: Any) -> Config:
    """config.json of a family; `changes` are made at its top."""
    vision, language = FAMILIES[name]
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "vision_config": {"model_type": "intern_vit_6b", **vision},
        "llm_config": language,
        "force_image_size": 56,
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "template": "internvl2_5",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "torch_dtype": "float32",
    }
    return copy.deepcopy({**config, **changes})


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of an original checkpoint."""
    return {
        **vision_shapes(config["vision_config"]),
        **_projector_shapes(config["vision_config"], config["llm_config"]),
        **{f"language_model.{name}": shape for name, shape in language_shapes(config["llm_config"]).items()},
    }


def vision_shapes(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision.get("patch_size", 14)
    patches = (vision["image_size"] // patch) ** 2
    found = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, 1 + patches, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    for layer in range(vision["num_hidden_layers"]):
        own = dict(_vision_layer(vision, width, inner))
        found |= {f"vision_model.encoder.layers.{layer}.{name}": shape for name, shape in own.items()}
    return found


def _vision_layer(vision: Mapping[str, Any], width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "ls1", (width,)
    yield "ls2", (width,)
    for norm in ("norm1", "norm2"):
        yield f"{norm}.weight", (width,)
        if vision.get("norm_type", "rms_norm") == "layer_norm":
            yield f"{norm}.bias", (width,)
    yield "attn.qkv.weight", (3 * width, width)
    if vision.get("qkv_bias", False):
        yield "attn.qkv.bias", (3 * width,)
    if vision.get("qk_normalization", True):
        yield "attn.q_norm.weight", (width,)
        yield "attn.k_norm.weight", (width,)
    for name, rows, columns in (("attn.proj", width, width), ("mlp.fc1", inner, width), ("mlp.fc2", width, inner)):
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)


def _projector_shapes(vision: Mapping[str, Any], language: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    wide, hidden = 4 * vision["hidden_size"], language["hidden_size"]
    return {
        "mlp1.0.weight": (wide,),
        "mlp1.0.bias": (wide,),
        "mlp1.1.weight": (hidden, wide),
        "mlp1.1.bias": (hidden,),
        "mlp1.3.weight": (hidden, hidden),
        "mlp1.3.bias": (hidden,),
    }


def language_shapes(language: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names of a language model of its own."""
    kind = language["architectures"][0]
    hidden, vocabulary = language["hidden_size"], language["vocab_size"]
    embeddings, head = ("tok_embeddings", "output") if kind.startswith("InternLM2") else ("embed_tokens", "lm_head")
    found = {f"model.{embeddings}.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    layer = {"Intern": _internlm2_layer, "Phi3Fo": _phi3_layer}.get(kind[:6], _plain_layer)(language)
    for number in range(language["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {**found, f"{head}.weight": (vocabulary, hidden)}


def _sizes(language: Mapping[str, Any]) -> tuple[int, int, int, int]:
    hidden, heads = language["hidden_size"], language["num_attention_heads"]
    return hidden, language["intermediate_size"], hidden, language["num_key_value_heads"] * hidden // heads


def _plain_layer(language: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, queries, keys = _sizes(language)
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if language["architectures"][0] == "Qwen2ForCausalLM":
        found |= {
            f"self_attn.{part}_proj.bias": (rows,) for part, rows in zip("qkv", (queries, keys, keys), strict=True)
        }
    return found


def _phi3_layer(language: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, queries, keys = _sizes(language)
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.qkv_proj.weight": (queries + 2 * keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def _internlm2_layer(language: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, queries, keys = _sizes(language)
    found: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attention.wqkv.weight": (queries + 2 * keys, hidden),
        "attention.wo.weight": (hidden, queries),
        "feed_forward.w1.weight": (inner, hidden),
        "feed_forward.w3.weight": (inner, hidden),
        "feed_forward.w2.weight": (hidden, inner),
    }
    if language.get("bias", True):
        found |= {"attention.wqkv.bias": (queries + 2 * keys,), "attention.wo.bias": (hidden,)}
    return found


def random_tensors(wanted: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights at which a wrong norm, bias or layer scale is seen: none of them is 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in wanted.items():
        values = torch.randn(shape, generator=generator)
        is_scale = len(shape) == 1 and not name.endswith("bias")
        tensors[name] = 1 + 0.3 * values if is_scale else values / max(math.prod(shape[1:]), 9) ** 0.5
    return tensors


def write_folder(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], tokenizer: str | None) -> Path:
    """A checkpoint in one file; `tokenizer` is the golden checkpoint whose tokenizer it takes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    return folder


def copy_tokenizer(name: str, folder: Path) -> None:
    for file in TOKENIZER_FILES:
        if (CHECKPOINTS / name / file).is_file():
            shutil.copy(CHECKPOINTS / name / file, folder)


def write_family(folder: Path, name: str, *, tokenizer: bool = True, **changes: Any) -> Path:
    """A checkpoint of a family, random."""
    config = family_config(name, **changes)
    return write_folder(folder, config, random_tensors(shapes(config)), "qwen2_vit300m" if tokenizer else None)


def copy_golden(name: str, folder: Path, **changes: Any) -> Path:
    """A golden checkpoint without its reference files; `changes` are made at the top of its config.json."""
    kept = shutil.ignore_patterns("*.npz", "meta.json")
    shutil.copytree(CHECKPOINTS / name, folder, ignore=kept)
    change_config(folder, **changes)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; a dict sets fields of a section, None takes a field away."""
    config = read_config(folder)
    for key, value in changes.items():
        section, new = (config.setdefault(key, {}), value) if isinstance(value, dict) else (config, {key: value})
        section.update(new)
        for name in [name for name, entry in section.items() if entry is None and name in new]:
            del section[name]
    (folder / "config.json").write_text(json.dumps(config))


def settings(source: Path, target: Path, **changes: Any) -> ConvertConfig:
    """Of a conversion, without a progress bar."""
    return ConvertConfig(**{"source": str(source), "target": str(target), "progress_bar": False, **changes})


def difference(left: Tensor | None, right: Tensor | None) -> float:
    """Largest absolute difference of two tensors of one shape."""
    assert left is not None
    assert right is not None
    assert left.shape == right.shape
    return (left - right).abs().max().item()
