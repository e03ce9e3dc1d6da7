"""config.json of the original checkpoints <-> transformers' InternVLConfig.

`original_fields.py` is the table of fields; here is what goes beyond a name for a name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ivl_lightning.checkpoints.key_map import INTERNLM2, SAME_NAMES
from ivl_lightning.checkpoints.source import CheckpointError
from ivl_lightning.models.config_checks import built, check_choice, check_counts, check_known, check_layer
from ivl_lightning.models.original_fields import (
    CLASS_SETTINGS,
    LANGUAGE_FIELDS,
    MODEL_TYPES,
    NULLABLE,
    OWN_FIELDS,
    RELEASED_SETTINGS,
    REQUIRED,
    ROPE_NAMES,
    VISION_FIELDS,
    Field,
)
from ivl_lightning.models.parts import patch_size, set_image_size, text_config, tile_size, vision_config

ORIGINAL_TYPE: Final = "internvl_chat"
ORIGINAL_VISION_TYPE: Final = "intern_vit_6b"
DEFAULT_TEMPLATE: Final = "internvl2_5"
RECORD: Final = "internvl_chat"
"""Attribute of InternVLConfig that keeps the original's config.json, also for what has no place elsewhere."""


def from_original(config: Mapping[str, Any], file: Path) -> InternVLConfig:
    """InternVLConfig of an original checkpoint; the whole original stays in its `internvl_chat`.

    Args:
        config: parsed config.json.
        file: it was read from, for messages.

    Raises:
        CheckpointError: a field is missing, of a wrong kind, or has a value that is not supported.
    """
    language, vision = _part(config, "llm_config", file), _part(config, "vision_config", file)
    tile = config.get("force_image_size") or vision.get("image_size", 224)
    sizes = {"force_image_size": tile, "image_size": vision.get("image_size", 224)}
    check_counts(sizes, ("force_image_size", "image_size"), file)
    check_choice("ps_version", config.get("ps_version", "v1"), file)
    ratio = config.get("downsample_ratio", 0.5)
    tower = vision_from_original({**vision, "image_size": tile}, file)
    internvl: InternVLConfig = built(
        file,
        InternVLConfig,
        vision_config=tower,
        text_config=language_from_original(language, file),
        downsample_ratio=ratio,
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=False,
    )
    check_layer(internvl, file)
    set_image_size(internvl, int(tile))
    setattr(internvl, RECORD, copy.deepcopy(dict(config)))
    return internvl


def vision_from_original(vision: Mapping[str, Any], file: Path) -> InternVLVisionConfig:
    """The vision tower's part; also the config.json of an InternViT of its own.

    Raises:
        CheckpointError: see `from_original`.
    """
    values = _to_native(VISION_FIELDS, vision, file)
    check_choice("norm_type", values["norm_type"], file)
    check_counts(values, ("patch_size", "hidden_size", "num_attention_heads", "num_hidden_layers"), file)
    check_known("hidden_act", values["hidden_act"], ACT2FN, file)
    if values["hidden_size"] % values["num_attention_heads"]:
        raise CheckpointError(
            f"{file}: the vision tower's hidden_size={values['hidden_size']} is no multiple of its "
            f"num_attention_heads={values['num_attention_heads']}: fetch the file again"
        )
    tower: InternVLVisionConfig = built(file, InternVLVisionConfig, **values, use_mean_pooling=True)
    return tower


def language_from_original(language: Mapping[str, Any], file: Path) -> PreTrainedConfig:
    """The language model's part; also the config.json of a language model of its own.

    Raises:
        CheckpointError: see `from_original`.
    """
    name = language_class(language, file)
    values = _to_native((*LANGUAGE_FIELDS, *OWN_FIELDS[name]), language, file)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values = {key: value for key, value in values.items() if value is not None or key.endswith("token_id")}
    check_counts(values, ("hidden_size", "num_attention_heads", "num_key_value_heads"), file)
    check_known("hidden_act", values["hidden_act"], ACT2FN, file)
    values["rope_parameters"] = _rope_from_original(language, file)
    check_known("rope_scaling.type", values["rope_parameters"]["rope_type"], ("default", *ROPE_INIT_FUNCTIONS), file)
    text: PreTrainedConfig = built(
        file, AutoConfig.for_model, MODEL_TYPES[name], **values, tie_word_embeddings=False, use_cache=True
    )
    return text


def language_class(language: Mapping[str, Any], file: Path) -> str:
    """The original's class of the language model.

    Raises:
        CheckpointError: it is not named, or not supported.
    """
    named = named_class(language)
    if named not in MODEL_TYPES:
        raise CheckpointError(
            f"{file}: the language model's architectures names {named!r}; supported are "
            f"{', '.join((INTERNLM2, *SAME_NAMES))}"
        )
    return str(named)


def named_class(language: Mapping[str, Any]) -> object:
    """The class of a language model by its config.json; None where it names none."""
    by_type = INTERNLM2 if language.get("model_type") == "internlm2" else None
    return first_architecture(language) or by_type


def first_architecture(config: Mapping[str, Any]) -> object:
    """The class that a config.json names; None where it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names else None


def has_original_class(config: InternVLConfig) -> bool:
    """Whether the original layout has a class for the language model."""
    return text_config(config).model_type in MODEL_TYPES.values()


def native_language_class(config: InternVLConfig) -> str:
    """The original's class for the language model of a native configuration: the recorded one, else its own.

    Raises:
        CheckpointError: the original has none for it.
    """
    text = text_config(config)
    recorded = named_class(record(config).get("llm_config") or {})
    if MODEL_TYPES.get(str(recorded)) == text.model_type:
        return str(recorded)
    own = {kind: name for name, kind in MODEL_TYPES.items() if name != INTERNLM2}
    if text.model_type not in own:
        raise CheckpointError(
            f"the language model is of model_type {text.model_type!r}, for which the original layout has no class; "
            f"it has some for {', '.join(own)}: use layout=hf"
        )
    return own[text.model_type]


def record(config: InternVLConfig) -> dict[str, Any]:
    """The original's own settings (`template`, `ps_version`, `max_dynamic_patch`, ...), as far as known."""
    return getattr(config, RECORD, None) or {}


def keep_record(config: InternVLConfig, template: str | None) -> None:
    """Make sure that a network knows its chat template, in place; one that the original has no class for cannot.

    Args:
        config: with or without a record.
        template: it is trained with; None leaves what the record says.
    """
    if record(config):
        setattr(config, RECORD, {**record(config), **({} if template is None else {"template": template})})
    elif has_original_class(config):
        setattr(config, RECORD, to_original(config, template=template or DEFAULT_TEMPLATE))


def image_settings(config: InternVLConfig) -> dict[str, Any]:
    """How the original cuts pictures: what its config.json says, and the defaults of its class for what it leaves out.

    A network that never had such a file takes what all releases since 1.5 have.
    """
    return {**(CLASS_SETTINGS if record(config) else RELEASED_SETTINGS), **record(config)}


def is_transposed(config: InternVLConfig) -> bool:
    """Whether image tokens run down the columns (`ps_version` v1, InternVL 1.1 and 1.2) and not along the rows."""
    return bool(record(config)) and record(config).get("ps_version", "v1") == "v1"


def set_order(config: InternVLConfig, version: str | None) -> None:
    """Give a network of new parts the order of a tile's tokens (`ps_version`), in place; None leaves it.

    Raises:
        CheckpointError: it is of the other order, or its language model has no class in the original, which alone can
            express v1.
    """
    if version is None or is_transposed(config) == (version == "v1"):
        return
    kept = record(config)
    if not kept:
        raise CheckpointError(
            f"ps_version={version}: only the original's layout can say so, and it has no class for a language model of "
            f"type {text_config(config).model_type}"
        )
    setattr(config, RECORD, {**kept, "ps_version": version})


def to_original(config: InternVLConfig, *, template: str, language: str | None = None) -> dict[str, Any]:
    """config.json of the original layout.

    Args:
        config: its recorded original is the base, if there is one.
        template: chat template where none is recorded.
        language: the original's class of the language model; the recorded or own one by default.

    Raises:
        CheckpointError: the original has no class for the language model.
    """
    name, kept = language or native_language_class(config), record(config)
    base = copy.deepcopy(kept) or _unrecorded(template)
    before = from_original(kept, Path("config.json")) if kept else None
    return {
        **base,
        "model_type": ORIGINAL_TYPE,
        "architectures": ["InternVLChatModel"],
        "llm_config": {**base["llm_config"], **_language_changes(config, name, before), "architectures": [name]},
        "vision_config": {**base["vision_config"], **_vision_changes(config, before)},
        "force_image_size": tile_size(config),
        "hidden_size": text_config(config).hidden_size,
        "downsample_ratio": config.downsample_ratio,
        "select_layer": config.vision_feature_layer,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "tie_word_embeddings": False,
    }


def _language_changes(config: InternVLConfig, name: str, before: InternVLConfig | None) -> dict[str, Any]:
    """What differs from the recorded original, all of it where there is none."""
    language = text_config(config)
    then = None if before is None else text_config(before)
    changes = _changes((*LANGUAGE_FIELDS, *OWN_FIELDS[name]), language, then)
    if then is None:
        kind = "internlm2" if name == INTERNLM2 else language.model_type
        changes |= {"model_type": kind, "tie_word_embeddings": False}
    if then is None or language.rope_parameters != then.rope_parameters:
        changes |= _rope_to_original(language)
    return changes


def _vision_changes(config: InternVLConfig, before: InternVLConfig | None) -> dict[str, Any]:
    changes = _changes(VISION_FIELDS, vision_config(config), None if before is None else vision_config(before))
    if before is None:
        changes |= {"model_type": ORIGINAL_VISION_TYPE, "architectures": ["InternVisionModel"]}
    sizes = {"image_size": tile_size(config), "patch_size": patch_size(config)}
    return {key: sizes.get(key, value) for key, value in changes.items()}


def _changes(fields: tuple[Field, ...], config: PreTrainedConfig, before: PreTrainedConfig | None) -> dict[str, Any]:
    values = {field: getattr(config, field.native, field.default) for field in fields}
    return {
        field.original: value
        for field, value in values.items()
        if before is None or value != getattr(before, field.native, field.default)
    }


def _unrecorded(template: str) -> dict[str, Any]:
    return {
        "template": template,
        "ps_version": "v2",
        **RELEASED_SETTINGS,
        "llm_config": {},
        "vision_config": {},
    }


def _part(config: Mapping[str, Any], key: str, file: Path) -> Mapping[str, Any]:
    part = config.get(key)
    if not isinstance(part, Mapping):
        raise CheckpointError(f"{file} has no {key}: it is not the config.json of an InternVL checkpoint")
    return part


def _to_native(fields: tuple[Field, ...], values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    missing = [field.original for field in fields if field.default is REQUIRED and field.original not in values]
    if missing:
        raise CheckpointError(f"{file} does not give {', '.join(missing)}: fetch it again")
    nulls = [field.original for field in fields if _is_lost(field, values)]
    if nulls:
        raise CheckpointError(f"{file}: {', '.join(nulls)} must not be null: fetch it again")
    return {field.native: values.get(field.original, field.default) for field in fields}


def _is_lost(field: Field, values: Mapping[str, Any]) -> bool:
    """Whether a file says null where its class needs a value."""
    may_be_null = field.default is None or field.original in NULLABLE
    return field.original in values and values[field.original] is None and not may_be_null


def _rope_from_original(language: Mapping[str, Any], file: Path) -> dict[str, Any]:
    scaling, theta = language.get("rope_scaling"), language.get("rope_theta", 10000.0)
    if not isinstance(scaling, Mapping | None) or not isinstance(theta, (int, float)):
        raise CheckpointError(
            f"{file}: rope_scaling={scaling!r} must be null or a mapping, rope_theta={theta!r} a number: fetch it again"
        )
    scaling = dict(scaling or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    rope = {"rope_type": ROPE_NAMES.get(kind, kind), "rope_theta": theta, **scaling}
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = language.get("original_max_position_embeddings", 4096)
    return rope


def _rope_to_original(language: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(language.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    # Llama 3's is part of its rule; elsewhere it is a field of its own, or none.
    own = (
        {"partial_rotary_factor"} if kind == "llama3" else {"partial_rotary_factor", "original_max_position_embeddings"}
    )
    scaling = {key: value for key, value in rope.items() if key not in own and value is not None}
    old = {new: name for name, new in ROPE_NAMES.items()}
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": old.get(kind, kind), **scaling},
    }
