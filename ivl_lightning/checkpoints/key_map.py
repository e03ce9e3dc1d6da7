"""The one table between names of the original checkpoints and those of transformers' InternVL model, both ways.

Original: `OpenGVLab/InternVL2_5-*`. Native: `state_dict()` of `InternVLForConditionalGeneration`. What that class
writes to disk (`-hf` repositories) differs from the native names by four prefixes. Sources: `modeling_intern_vit.py`,
`modeling_internvl_chat.py`, `modeling_internlm2.py` of the original.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ivl_lightning.checkpoints.splits import GroupedRows, RowBlocks, Split, Whole

INTERNLM2: Final = "InternLM2ForCausalLM"
PHI3: Final = "Phi3ForCausalLM"
SAME_NAMES: Final = ("Qwen2ForCausalLM", "LlamaForCausalLM", PHI3)
"""Language models whose tensors transformers' own class takes as they are."""

_PLACEHOLDERS = {"n": r"\d+", "kind": "weight|bias", "rest": ".+"}


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table.

    Attributes:
        original: name with placeholders: `{n}` a layer, `{kind}` weight or bias, `{rest}` anything.
        native: names of the parts, with the same placeholders.
        split: how the tensor is divided into them.
    """

    original: str
    native: tuple[str, ...]
    split: Split


def _same(original: str, native: str) -> Rule:
    return Rule(original, (native,), Whole())


_VIT = "vision_model.encoder.layers.{n}."
_TOWER = "model.vision_tower.encoder.layer.{n}."
VISION: Final = (
    _same("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    _same("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    _same(
        "vision_model.embeddings.patch_embedding.{kind}",
        "model.vision_tower.embeddings.patch_embeddings.projection.{kind}",
    ),
    Rule(
        _VIT + "attn.qkv.{kind}",
        tuple(_TOWER + f"attention.{part}_proj.{{kind}}" for part in "qkv"),
        RowBlocks(3),
    ),
    _same(_VIT + "attn.proj.{kind}", _TOWER + "attention.projection_layer.{kind}"),
    _same(_VIT + "attn.q_norm.weight", _TOWER + "attention.q_norm.weight"),
    _same(_VIT + "attn.k_norm.weight", _TOWER + "attention.k_norm.weight"),
    _same(_VIT + "norm1.{kind}", _TOWER + "layernorm_before.{kind}"),
    _same(_VIT + "norm2.{kind}", _TOWER + "layernorm_after.{kind}"),
    _same(_VIT + "mlp.fc1.{kind}", _TOWER + "mlp.fc1.{kind}"),
    _same(_VIT + "mlp.fc2.{kind}", _TOWER + "mlp.fc2.{kind}"),
    _same(_VIT + "ls1", _TOWER + "lambda_1"),
    _same(_VIT + "ls2", _TOWER + "lambda_2"),
)

PROJECTOR: Final = (
    _same("mlp1.0.{kind}", "model.multi_modal_projector.layer_norm.{kind}"),
    _same("mlp1.1.{kind}", "model.multi_modal_projector.linear_1.{kind}"),
    _same("mlp1.3.{kind}", "model.multi_modal_projector.linear_2.{kind}"),
)

_SAME_LANGUAGE: Final = (
    _same("language_model.model.{rest}", "model.language_model.{rest}"),
    _same("language_model.lm_head.{kind}", "lm_head.{kind}"),
)

_LM2 = "language_model.model.layers.{n}."
_LLAMA = "model.language_model.layers.{n}."


def _internlm2(heads: int, kv_heads: int) -> tuple[Rule, ...]:
    return (
        _same("language_model.model.tok_embeddings.weight", "model.language_model.embed_tokens.weight"),
        Rule(
            _LM2 + "attention.wqkv.{kind}",
            tuple(_LLAMA + f"self_attn.{part}_proj.{{kind}}" for part in "qkv"),
            GroupedRows(heads, kv_heads),
        ),
        _same(_LM2 + "attention.wo.{kind}", _LLAMA + "self_attn.o_proj.{kind}"),
        _same(_LM2 + "feed_forward.w1.weight", _LLAMA + "mlp.gate_proj.weight"),
        _same(_LM2 + "feed_forward.w3.weight", _LLAMA + "mlp.up_proj.weight"),
        _same(_LM2 + "feed_forward.w2.weight", _LLAMA + "mlp.down_proj.weight"),
        _same(_LM2 + "attention_norm.weight", _LLAMA + "input_layernorm.weight"),
        _same(_LM2 + "ffn_norm.weight", _LLAMA + "post_attention_layernorm.weight"),
        _same("language_model.model.norm.weight", "model.language_model.norm.weight"),
        _same("language_model.output.weight", "lm_head.weight"),
    )


HF_PREFIXES: Final = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""Native names in memory, and how they begin in the files of `save_pretrained`."""


def hf_name(native: str) -> str:
    """Name in the files that transformers writes."""
    for in_memory, on_disk in HF_PREFIXES:
        if native.startswith(in_memory):
            return on_disk + native.removeprefix(in_memory)
    return native


def native_name(name: str) -> str:
    """Name in memory of a tensor in a `-hf` folder; some of these hold the names in memory already."""
    for in_memory, on_disk in HF_PREFIXES:
        if name.startswith(on_disk):
            return in_memory + name.removeprefix(on_disk)
    return name


class KeyTable:
    """The rules of one kind of checkpoint.

    Args:
        rules: of which at most one fits a name.
    """

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._from_original = [(_pattern(rule.original), rule) for rule in rules]
        self._from_native = [(_pattern(name), rule, place) for rule in rules for place, name in enumerate(rule.native)]

    def to_native(self, original: str) -> tuple[tuple[str, ...], Split] | None:
        """Native names of an original tensor's parts and how it is split; None for a name that no rule knows."""
        found = [(match, rule) for pattern, rule in self._from_original if (match := pattern.fullmatch(original))]
        assert len(found) <= 1, (original, found)
        if not found:
            return None
        match, rule = found[0]
        return tuple(name.format(**match.groupdict()) for name in rule.native), rule.split

    def to_original(self, native: str) -> str | None:
        """Name of the original tensor that holds a native one; None for a name that no rule knows."""
        found = [(match, rule) for pattern, rule, _ in self._from_native if (match := pattern.fullmatch(native))]
        assert len(found) <= 1, (native, found)
        return found[0][1].original.format(**found[0][0].groupdict()) if found else None


def key_table(language_model: str, heads: int, kv_heads: int) -> KeyTable:
    """The table for a checkpoint with this language model.

    Args:
        language_model: the original's class, `llm_config.architectures[0]`.
        heads: query heads of the language model.
        kv_heads: its key-value heads.

    Raises:
        ValueError: a language model that the table does not know.
    """
    if language_model == INTERNLM2:
        return KeyTable((*VISION, *PROJECTOR, *_internlm2(heads, kv_heads)))
    if language_model in SAME_NAMES:
        return KeyTable((*VISION, *PROJECTOR, *_SAME_LANGUAGE))
    raise ValueError(
        f"llm_config.architectures names {language_model!r}; known are {', '.join((INTERNLM2, *SAME_NAMES))}"
    )


def _pattern(name: str) -> re.Pattern[str]:
    pattern = re.escape(name)
    for placeholder, fits in _PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape(f"{{{placeholder}}}"), f"(?P<{placeholder}>{fits})")
    return re.compile(pattern)
