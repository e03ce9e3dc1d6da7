"""Values of a checkpoint's config.json, checked with the file and the field in the message."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub.errors import StrictDataclassError
from transformers import InternVLConfig

from ivl_lightning.checkpoints.source import CheckpointError
from ivl_lightning.models.parts import vision_config

CHOICES: Final[Mapping[str, tuple[object, ...]]] = {
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


def check_layer(config: InternVLConfig, file: Path) -> None:
    """The features are those of a layer that the tower has.

    Raises:
        CheckpointError: they are not.
    """
    layer, layers = config.vision_feature_layer, vision_config(config).num_hidden_layers
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise CheckpointError(f"{file}: select_layer={layer}, but the vision tower has {layers} layers")


def check_counts(values: Mapping[str, Any], keys: tuple[str, ...], file: Path) -> None:
    """Some values are whole numbers above 0.

    Raises:
        CheckpointError: names the first that is not.
    """
    for key in keys:
        value = values.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{file}: {key}={value!r} must be a whole number above 0: fetch the file again")


def check_known(key: str, value: object, known: Collection[str], file: Path) -> None:
    """A value is one of those that the library has code for.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(f"{file}: {key}={value!r} is not known here; known are {', '.join(sorted(known))}")


def check_choice(key: str, value: object, file: Path) -> None:
    """A value is one of the few that a setting may have.

    Raises:
        CheckpointError: it is not.
    """
    if value not in CHOICES[key]:
        raise CheckpointError(f"{file}: {key}={value!r} is not one of {', '.join(map(str, CHOICES[key]))}")
