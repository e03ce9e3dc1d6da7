"""A model from parts: a vision tower, a projector and a language model of different origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLVisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from ivl_lightning.checkpoints.adapters import is_adapter
from ivl_lightning.checkpoints.files import open_file, open_folder
from ivl_lightning.checkpoints.key_map import INTERNLM2, PHI3, PROJECTOR, VISION, KeyTable, key_table
from ivl_lightning.checkpoints.source import CheckpointError, Combined, MemorySource, TensorSource, listed, renamed
from ivl_lightning.checkpoints.views import AsNative, is_computed
from ivl_lightning.constants import IMAGE_CONTEXT_TOKEN
from ivl_lightning.models.checkpoint import (
    CONFIG_NAME,
    Checkpoint,
    generation_in,
    open_checkpoint,
    read_config_values,
    tokenizer_in,
    untied,
)
from ivl_lightning.models.config_checks import built, check_layer
from ivl_lightning.models.original_config import (
    DEFAULT_TEMPLATE,
    ORIGINAL_TYPE,
    ORIGINAL_VISION_TYPE,
    RECORD,
    has_original_class,
    is_transposed,
    language_class,
    language_from_original,
    named_class,
    native_language_class,
    record,
    set_order,
    to_original,
    vision_from_original,
)
from ivl_lightning.models.original_fields import IMAGE_SETTINGS
from ivl_lightning.models.parts import patch_size, set_image_size, text_config, tile_size, vision_config
from ivl_lightning.models.positions import ResizedPositions

TOWER, JOINT = "model.vision_tower.", "model.multi_modal_projector."
LANGUAGE = ("model.language_model.", "lm_head.")
_NATIVE_VISION_TYPE = InternVLVisionConfig.model_type
_INTERNVL_TYPES = (ORIGINAL_TYPE, InternVLConfig.model_type)


class Tower(NamedTuple):
    """A vision tower: configuration, tensors with native names, and the whole model that it was taken from, if one."""

    config: InternVLVisionConfig
    tensors: TensorSource
    whole: InternVLConfig | None = None


class Language(NamedTuple):
    """A language model: configuration, tensors with native names, the original's class for it if there is one.

    Its tokenizer and settings of generation go with it.
    """

    config: PreTrainedConfig
    tensors: TensorSource
    original_class: str | None
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None
    generation: GenerationConfig | None


def open_tower(path: str | Path) -> Tower:
    """The vision tower of a folder: an InternViT of its own, or that of a whole checkpoint of either layout.

    That of an adapter's folder is its base's, with the adapter in it.

    Raises:
        CheckpointError: the folder holds neither.
    """
    folder = Path(path)
    values = {} if is_adapter(folder) else read_config_values(folder)
    kind = values.get("model_type")
    if is_adapter(folder) or kind in _INTERNVL_TYPES:
        whole = open_checkpoint(folder)
        return Tower(vision_config(whole.config), _only(whole.tensors, TOWER), whole.config)
    if kind == ORIGINAL_VISION_TYPE:
        tensors = renamed(open_folder(folder), lambda name: f"vision_model.{name.removeprefix('vision_model.')}")
        return Tower(vision_from_original(values, folder / CONFIG_NAME), AsNative(tensors, KeyTable(VISION)))
    if kind == _NATIVE_VISION_TYPE:
        config = built(folder / CONFIG_NAME, InternVLVisionConfig.from_dict, values)
        return Tower(config, renamed(open_folder(folder), lambda name: TOWER + name))
    raise CheckpointError(
        f"{folder / CONFIG_NAME}: model_type is {kind!r}, which is no vision tower; known are "
        f"{', '.join((ORIGINAL_VISION_TYPE, _NATIVE_VISION_TYPE, *_INTERNVL_TYPES))}"
    )


def open_language(path: str | Path) -> Language:
    """The language model of a folder: one of its own, or that of a whole checkpoint of either layout.

    Raises:
        CheckpointError: the folder holds neither, or a model that transformers does not know.
    """
    folder = Path(path)
    values = read_config_values(folder)
    file = folder / CONFIG_NAME
    if values.get("model_type") in _INTERNVL_TYPES:
        whole = open_checkpoint(folder)
        name = native_language_class(whole.config) if has_original_class(whole.config) else None
        tensors = _only(whole.tensors, *LANGUAGE)
        return Language(text_config(whole.config), tensors, name, whole.tokenizer, whole.generation)
    beside = tokenizer_in(folder), generation_in(folder)
    if named_class(values) == INTERNLM2:
        config = language_from_original(values, file)
        table = key_table(INTERNLM2, config.num_attention_heads, config.num_key_value_heads)
        tensors = renamed(open_folder(folder), lambda name: f"language_model.{name}")
        return Language(config, AsNative(tensors, table), language_class(values, file), *beside)
    # Names of a causal language model in transformers: `model.` and its head.
    tensors = renamed(open_folder(folder), _causal_name)
    return Language(_known_language(values, file), untied(tensors, values), None, *beside)


def open_projector(path: str | Path) -> TensorSource:
    """A projector: a released bare `mlp1` file (`.pth`, `.bin` or `.safetensors`), or that of a whole checkpoint.

    Raises:
        CheckpointError: the file is damaged or holds something else.
    """
    place = Path(path)
    if place.is_dir():
        return _only(open_checkpoint(place).tensors, JOINT)
    tensors = renamed(open_file(place), lambda name: f"mlp1.{name.removeprefix('mlp1.')}")
    native = AsNative(tensors, KeyTable(PROJECTOR))
    missing = _projector_names() - set(native.names())
    if missing:
        raise CheckpointError(f"{place} is no whole projector: {listed(missing)} are missing. Fetch it again")
    return native


def _projector_names() -> set[str]:
    return {rule.native[0].format(kind=kind) for rule in PROJECTOR for kind in ("weight", "bias")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where a network is read from.

    Attributes:
        path: whole checkpoint; gives the parts that are not named.
        vision: see `open_tower`.
        projector: see `open_projector`.
        language_model: see `open_language`.
        image_size: side of a tile in pixels; position embeddings are resized to it. None keeps the tower's.
        downsample_ratio: pixel unshuffle, where there is no whole checkpoint.
        template: chat template, where there is no whole checkpoint.
        ps_version: order of a tile's tokens, where there is no whole checkpoint; None is v2.
        vision_feature_layer: layer of the tower whose features are used, likewise; None is the last.
    """

    path: str | Path | None = None
    vision: str | Path | None = None
    projector: str | Path | None = None
    language_model: str | Path | None = None
    image_size: int | None = None
    downsample_ratio: float = 0.5
    template: str = DEFAULT_TEMPLATE
    ps_version: str | None = None
    vision_feature_layer: int | None = None


def open_sources(sources: Sources) -> Checkpoint:
    """Open a whole checkpoint, or parts as one.

    Raises:
        CheckpointError: a part is missing, cannot be read, or does not fit the others.
    """
    base = None if sources.path is None else open_checkpoint(sources.path)
    named = (sources.vision, sources.projector, sources.language_model)
    whole = base if base is not None and not any(named) else _assemble(base, sources)
    _check_order(whole, sources.ps_version)
    _check_feature_layer(whole, sources.vision_feature_layer)
    return with_image_size(whole, sources.image_size)


def _check_order(whole: Checkpoint, version: str | None) -> None:
    if version is not None and is_transposed(whole.config) != (version == "v1"):
        raise CheckpointError(
            f"ps_version={version} was asked for, but the image tokens of {whole.folder} are in the order "
            f"{'v1' if is_transposed(whole.config) else 'v2'}, which its weights were trained with"
        )


def _check_feature_layer(whole: Checkpoint, layer: int | None) -> None:
    """Layers are counted from either end: -1 is the last one."""
    layers, own = vision_config(whole.config).num_hidden_layers, whole.config.vision_feature_layer
    if layer is not None and (layer - own) % (layers + 1):
        raise CheckpointError(
            f"vision_feature_layer={layer} was asked for, but {whole.folder} takes the features of layer {own}, which "
            "its weights were trained with"
        )
    check_layer(whole.config, whole.folder / CONFIG_NAME)


def _assemble(base: Checkpoint | None, sources: Sources) -> Checkpoint:
    if base is None and (sources.vision is None or sources.language_model is None):
        raise CheckpointError(
            "a model from parts needs a vision tower and a language model (model.vision_path and "
            "model.language_model_path), or a whole checkpoint (model.path) that has the others"
        )
    tower = None if sources.vision is None else open_tower(sources.vision)
    language = None if sources.language_model is None else open_language(sources.language_model)
    config = _joint_config(base, tower, language, sources.downsample_ratio, sources.vision_feature_layer)
    replaced = (TOWER,) * (tower is not None) + LANGUAGE * (language is not None)
    kept: list[TensorSource] = [] if base is None else [_without(base.tensors, *replaced)]
    tensors = [*kept, *(part.tensors for part in (tower, language) if part is not None)]
    tensors.append(_projector(sources.projector, config, tensors))
    if base is None or language is not None:
        origin = base.config if base is not None else tower and tower.whole
        _make_record(config, origin, language, sources.template)
        if origin is None:
            set_order(config, sources.ps_version)
    speaker = language or base
    assert speaker is not None
    _take_image_token(config, speaker.tokenizer)
    return Checkpoint(
        folder=base.folder if base is not None else Path(str(sources.vision)),
        config=config,
        tensors=Combined(tensors),
        tokenizer=speaker.tokenizer,
        generation=speaker.generation,
    )


def _take_image_token(config: InternVLConfig, tokenizer: Callable[[], PreTrainedTokenizerBase] | None) -> None:
    """The id that stands for image features, where the tokenizer has one; a bare language model has none yet."""
    found = None if tokenizer is None else tokenizer().get_vocab().get(IMAGE_CONTEXT_TOKEN)
    if found is not None:
        config.image_token_id = found


def with_image_size(checkpoint: Checkpoint, image_size: int | None) -> Checkpoint:
    """The checkpoint for tiles of another side in pixels; None keeps it.

    Raises:
        CheckpointError: the side is no multiple of the patch.
    """
    config, patch = checkpoint.config, patch_size(checkpoint.config)
    if image_size is None or image_size == tile_size(config):
        return checkpoint
    if image_size % patch:
        raise CheckpointError(f"image_size={image_size} is no multiple of the vision tower's patch of {patch} pixels")
    set_image_size(config, image_size)
    return replace(checkpoint, tensors=ResizedPositions(checkpoint.tensors, image_size // patch))


def _joint_config(
    base: Checkpoint | None, tower: Tower | None, language: Language | None, downsample_ratio: float, wanted: int | None
) -> InternVLConfig:
    if base is None:
        assert tower is not None
        assert language is not None
        config = InternVLConfig(
            vision_config=tower.config,
            text_config=language.config,
            downsample_ratio=downsample_ratio,
            vision_feature_layer=_feature_layer(tower, wanted),
            tie_word_embeddings=False,
        )
    else:
        config = base.config
        config.vision_config = vision_config(config) if tower is None else tower.config
        config.text_config = text_config(config) if language is None else language.config
    text_config(config).tie_word_embeddings = False
    set_image_size(config, tile_size(config))
    return config


def _feature_layer(tower: Tower, wanted: int | None) -> int:
    if tower.whole is not None:
        return int(tower.whole.vision_feature_layer)
    return -1 if wanted is None else wanted


def _projector(path: str | Path | None, config: InternVLConfig, sources: list[TensorSource]) -> TensorSource:
    """The given projector; else nothing where the one of the base fits; else a new one as torch makes it."""
    if path is not None:
        return open_projector(path)
    shapes = {name: source.meta(name).shape for source in sources for name in source.names() if name.startswith(JOINT)}
    with torch.device("meta"):
        wanted = {JOINT + name: value.shape for name, value in InternVLMultiModalProjector(config).named_parameters()}
    if shapes == wanted:
        return MemorySource({})
    return new_projector(config)


def new_projector(config: InternVLConfig) -> MemorySource:
    """A projector with torch's own random start, as the original gives a new one."""
    module: nn.Module = InternVLMultiModalProjector(config)
    tensors: dict[str, Tensor] = {JOINT + name: value for name, value in module.state_dict().items()}
    return MemorySource(tensors, "a new projector")


def _make_record(
    config: InternVLConfig, origin: InternVLConfig | None, language: Language | None, template: str
) -> None:
    """The original's settings for the model that was put together, where the original knows its language model.

    Args:
        config: gets them, in place.
        origin: whole model that gave the tower: how pictures are cut, and the order of their tokens, stay its own.
        language: of the model.
        template: chat template, where there is no whole model.
    """
    own = None if language is None else language.original_class
    kept = {} if origin is None else dict(record(origin))
    setattr(config, RECORD, None)
    if own is None and not has_original_class(config):
        return
    made = to_original(config, template=template, language=own)
    setattr(config, RECORD, {**made, **{key: value for key, value in kept.items() if key in IMAGE_SETTINGS}})


def _known_language(values: Mapping[str, Any], file: Path) -> PreTrainedConfig:
    given = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    if values.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{file}: no language model that transformers knows has the model_type {values.get('model_type')!r}"
        )
    if named_class(values) == PHI3:
        # Its older files name rotary settings as the library no longer does.
        return language_from_original(values, file)
    config: PreTrainedConfig = built(file, AutoConfig.for_model, values["model_type"], **given)
    _check_head(config, file)
    return config


def _check_head(config: PreTrainedConfig, file: Path) -> None:
    """A head that is more than a matrix would be lost: the joint model has a plain one."""
    scales = {key: getattr(config, key, None) for key in ("logit_scale", "logits_scaling", "final_logit_softcapping")}
    strange = [f"{key}={value}" for key, value in scales.items() if value not in (None, 1, 1.0)]
    if strange:
        raise CheckpointError(
            f"{file}: {', '.join(strange)} changes logits behind the head, which this model cannot do"
        )


def _causal_name(name: str) -> str | None:
    if is_computed(name):
        return None
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _only(tensors: TensorSource, *prefixes: str) -> TensorSource:
    return renamed(tensors, lambda name: name if name.startswith(prefixes) else None)


def _without(tensors: TensorSource, *prefixes: str) -> TensorSource:
    return renamed(tensors, lambda name: None if name.startswith(prefixes) else name)
