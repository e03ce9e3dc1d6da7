"""config.json of the original checkpoints <-> transformers' InternVLConfig.

Source: `configuration_internvl_chat.py`, `configuration_intern_vit.py` and `configuration_internlm2.py` of the
original; a field that a file leaves out has the default of these classes, which is not always that of the releases.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ivl_lightning.checkpoints.key_map import INTERNLM2, PHI3, SAME_NAMES
from ivl_lightning.checkpoints.source import CheckpointError
from ivl_lightning.models.parts import patch_size, set_image_size, text_config, tile_size, vision_config

ORIGINAL_TYPE: Final = "internvl_chat"
ORIGINAL_VISION_TYPE: Final = "intern_vit_6b"
DEFAULT_TEMPLATE: Final = "internvl2_5"
RECORD: Final = "internvl_chat"
"""Attribute of InternVLConfig that keeps the original's config.json, also for what has no place elsewhere."""

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
_CLASS_SETTINGS: Final[Mapping[str, Any]] = {
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
}

_MODEL_TYPES: Final = {
    INTERNLM2: "llama",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    PHI3: "phi3",
}
_REQUIRED: Final = object()
_NULLABLE: Final = ("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id")


class _Field(NamedTuple):
    original: str
    native: str
    default: Any = None


def _same(name: str, default: Any = None) -> _Field:
    return _Field(name, name, default)


_VISION: Final = (
    _same("num_channels", 3),
    _same("hidden_size", 3200),
    _same("num_attention_heads", 25),
    _same("intermediate_size", 12800),
    _same("num_hidden_layers", 48),
    _same("hidden_act", "gelu"),
    _same("norm_type", "rms_norm"),
    _same("layer_norm_eps", 1e-6),
    _same("attention_dropout", 0.0),
    _same("initializer_range", 0.02),
    _same("patch_size", 14),
    _same("image_size", 224),
    _Field("qkv_bias", "attention_bias", False),
    _Field("qk_normalization", "use_qk_norm", True),
    _Field("dropout", "hidden_dropout_prob", 0.0),
    _Field("initializer_factor", "layer_scale_init_value", 0.1),
)

_LANGUAGE: Final = (
    _same("vocab_size", _REQUIRED),
    _same("hidden_size", _REQUIRED),
    _same("intermediate_size", _REQUIRED),
    _same("num_hidden_layers", _REQUIRED),
    _same("num_attention_heads", _REQUIRED),
    _same("num_key_value_heads"),
    _same("hidden_act", "silu"),
    _same("max_position_embeddings", 2048),
    _same("initializer_range", 0.02),
    _same("rms_norm_eps", 1e-6),
    _same("bos_token_id"),
    _same("eos_token_id"),
    _same("pad_token_id"),
)
_LANGUAGE_OWN: Final[Mapping[str, tuple[_Field, ...]]] = {
    INTERNLM2: (
        _Field("bias", "attention_bias", True),
        _same("bos_token_id", 1),
        _same("eos_token_id", 2),
        _same("pad_token_id", 0),
    ),
    "Qwen2ForCausalLM": (
        _same("max_position_embeddings", 32768),
        _same("attention_dropout", 0.0),
        _same("use_sliding_window", False),
        _same("sliding_window", 4096),
        _same("max_window_layers", 28),
    ),
    "LlamaForCausalLM": (
        _same("attention_bias", False),
        _same("attention_dropout", 0.0),
        _same("head_dim"),
        _same("bos_token_id", 1),
        _same("eos_token_id", 2),
    ),
    "Phi3ForCausalLM": (
        _same("max_position_embeddings", 4096),
        _same("rms_norm_eps", 1e-5),
        _same("attention_dropout", 0.0),
        _same("resid_pdrop", 0.0),
        _same("embd_pdrop", 0.0),
        _same("original_max_position_embeddings", 4096),
        _same("sliding_window"),
    ),
}
_ROPE_NAMES: Final = {"su": "longrope"}
_CHOICES: Final[Mapping[str, tuple[object, ...]]] = {
    "norm_type": ("layer_norm", "rms_norm"),
    "ps_version": ("v1", "v2"),
}


def built(file: Path, build: Any, *arguments: Any, **values: Any) -> Any:
    """Build one of the library's configurations, whose checks end in errors of many kinds.

    Args:
        file: the values are from, for messages.
        build: class or function.
        *arguments: of it.
        **values: fields.

    Raises:
        CheckpointError: names the file, and the field as far as the library does.
    """
    try:
        return build(*arguments, **values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: a field cannot be used: {error}") from error


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
    _check_counts(sizes, ("force_image_size", "image_size"), file)
    _check_choice("ps_version", config.get("ps_version", "v1"), file)
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
    _check_layer(internvl, file)
    set_image_size(internvl, int(tile))
    setattr(internvl, RECORD, copy.deepcopy(dict(config)))
    return internvl


def vision_from_original(vision: Mapping[str, Any], file: Path) -> InternVLVisionConfig:
    """The vision tower's part; also the config.json of an InternViT of its own.

    Raises:
        CheckpointError: see `from_original`.
    """
    values = _to_native(_VISION, vision, file)
    _check_choice("norm_type", values["norm_type"], file)
    _check_counts(values, ("patch_size", "hidden_size", "num_attention_heads", "num_hidden_layers"), file)
    _check_known("hidden_act", values["hidden_act"], ACT2FN, file)
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
    values = _to_native((*_LANGUAGE, *_LANGUAGE_OWN[name]), language, file)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values = {key: value for key, value in values.items() if value is not None or key.endswith("token_id")}
    _check_counts(values, ("hidden_size", "num_attention_heads", "num_key_value_heads"), file)
    _check_known("hidden_act", values["hidden_act"], ACT2FN, file)
    values["rope_parameters"] = _rope_from_original(language, file)
    _check_known("rope_scaling.type", values["rope_parameters"]["rope_type"], ("default", *ROPE_INIT_FUNCTIONS), file)
    text: PreTrainedConfig = built(
        file, AutoConfig.for_model, _MODEL_TYPES[name], **values, tie_word_embeddings=False, use_cache=True
    )
    return text


def language_class(language: Mapping[str, Any], file: Path) -> str:
    """The original's class of the language model.

    Raises:
        CheckpointError: it is not named, or not supported.
    """
    named = named_class(language)
    if named not in _MODEL_TYPES:
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
    return text_config(config).model_type in _MODEL_TYPES.values()


def native_language_class(config: InternVLConfig) -> str:
    """The original's class for the language model of a native configuration: the recorded one, else its own.

    Raises:
        CheckpointError: the original has none for it.
    """
    text = text_config(config)
    recorded = named_class(record(config).get("llm_config") or {})
    if _MODEL_TYPES.get(str(recorded)) == text.model_type:
        return str(recorded)
    own = {kind: name for name, kind in _MODEL_TYPES.items() if name != INTERNLM2}
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
    return {**(_CLASS_SETTINGS if record(config) else RELEASED_SETTINGS), **record(config)}


def is_transposed(config: InternVLConfig) -> bool:
    """Whether image tokens run down the columns (`ps_version` v1, InternVL 1.1 and 1.2) and not along the rows."""
    return bool(record(config)) and record(config).get("ps_version", "v1") == "v1"


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
    changes = _changes((*_LANGUAGE, *_LANGUAGE_OWN[name]), language, then)
    if then is None:
        kind = "internlm2" if name == INTERNLM2 else language.model_type
        changes |= {"model_type": kind, "tie_word_embeddings": False}
    if then is None or language.rope_parameters != then.rope_parameters:
        changes |= _rope_to_original(language)
    return changes


def _vision_changes(config: InternVLConfig, before: InternVLConfig | None) -> dict[str, Any]:
    changes = _changes(_VISION, vision_config(config), None if before is None else vision_config(before))
    if before is None:
        changes |= {"model_type": ORIGINAL_VISION_TYPE, "architectures": ["InternVisionModel"]}
    sizes = {"image_size": tile_size(config), "patch_size": patch_size(config)}
    return {key: sizes.get(key, value) for key, value in changes.items()}


def _changes(fields: tuple[_Field, ...], config: PreTrainedConfig, before: PreTrainedConfig | None) -> dict[str, Any]:
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


def _to_native(fields: tuple[_Field, ...], values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    missing = [field.original for field in fields if field.default is _REQUIRED and field.original not in values]
    if missing:
        raise CheckpointError(f"{file} does not give {', '.join(missing)}: fetch it again")
    nulls = [field.original for field in fields if _is_lost(field, values)]
    if nulls:
        raise CheckpointError(f"{file}: {', '.join(nulls)} must not be null: fetch it again")
    return {field.native: values.get(field.original, field.default) for field in fields}


def _is_lost(field: _Field, values: Mapping[str, Any]) -> bool:
    """Whether a file says null where its class needs a value."""
    may_be_null = field.default is None or field.original in _NULLABLE
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
    rope = {"rope_type": _ROPE_NAMES.get(kind, kind), "rope_theta": theta, **scaling}
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
    old = {new: name for name, new in _ROPE_NAMES.items()}
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": old.get(kind, kind), **scaling},
    }


def _check_layer(config: InternVLConfig, file: Path) -> None:
    layer, layers = config.vision_feature_layer, vision_config(config).num_hidden_layers
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise CheckpointError(f"{file}: select_layer={layer}, but the vision tower has {layers} layers")


def _check_counts(values: Mapping[str, Any], keys: tuple[str, ...], file: Path) -> None:
    for key in keys:
        value = values.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{file}: {key}={value!r} must be a whole number above 0: fetch the file again")


def _check_known(key: str, value: object, known: Collection[str], file: Path) -> None:
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(f"{file}: {key}={value!r} is not known here; known are {', '.join(sorted(known))}")


def _check_choice(key: str, value: object, file: Path) -> None:
    if value not in _CHOICES[key]:
        raise CheckpointError(f"{file}: {key}={value!r} is not one of {', '.join(map(str, _CHOICES[key]))}")
