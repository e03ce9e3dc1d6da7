"""Checkpoints with LoRA adapters, seen as if they had been merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ivl_lightning.checkpoints.files import open_file, read_json
from ivl_lightning.checkpoints.key_map import native_name
from ivl_lightning.checkpoints.lora import lora_groups, merge
from ivl_lightning.checkpoints.source import CheckpointError, TensorSource, renamed

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "target_parameters",
    "trainable_token_indices",
)


class Merged:
    """Tensors with their adapters added, under the names of a model without adapters.

    Args:
        source: base weights and adapters together.
        scale: alpha / rank.

    Raises:
        CheckpointError: adapters that do not fit the weights.
    """

    def __init__(self, source: TensorSource, scale: float) -> None:
        self._source = source
        self._scale = scale
        try:
            self._groups = lora_groups(source.names())
        except ValueError as error:
            raise CheckpointError(f"{source.where(source.names()[0])}: {error}") from error

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return list(self._groups)

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._source.meta(self._groups[name].base)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        group = self._groups[name]
        base = self._source.read(group.base)
        if group.a is None or group.b is None:
            return base
        try:
            return merge(base, self._source.read(group.a), self._source.read(group.b), self._scale)
        except ValueError as error:
            raise CheckpointError(f"{self._source.where(group.a)}: {group.a}: {error}") from error

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._source.where(self._groups[name].base)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone, without the model that it belongs to."""
    return (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in ADAPTER_WEIGHTS)


def adapter_base(folder: Path) -> Path:
    """The folder of the model that an adapter belongs to.

    Raises:
        CheckpointError: it is not named, or not there.
    """
    named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    # Relative to where the command runs, as peft has it, or to the adapter.
    base = next((place for place in (Path(str(named)), folder / str(named)) if place.is_dir()), None)
    if not named or base is None or base.resolve() == folder.resolve():
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names the base model {named!r}, which is no other folder here: set "
            "base_model_name_or_path there to the folder that holds it"
        )
    return base


def adapter_scale(folder: Path) -> float:
    """alpha / rank of an adapter in peft's format.

    Raises:
        CheckpointError: it is of a kind that cannot be merged here.
    """
    config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
    strange = [key for key in _UNSUPPORTED if config.get(key)]
    # Other starts change the base too: merging A and B into the base that lies on disk would not be what was trained.
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        strange.append(f"init_lora_weights={config['init_lora_weights']}")
    if config.get("peft_type") != "LORA" or strange:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: only plain LoRA can be merged here, this is {config.get('peft_type')} with "
            f"{', '.join(strange) or 'no further options'}: merge it with peft"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: r={rank!r} and lora_alpha={alpha!r} must be numbers, r above 0"
        )
    return float(alpha) / rank


def open_adapter(folder: Path) -> TensorSource:
    """The adapter's own tensors under native names, `X.lora_A.weight` and `X.lora_B.weight`.

    Raises:
        CheckpointError: its file is damaged.
    """
    file = next(folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file())
    return renamed(open_file(file), lambda name: native_name(name.removeprefix(_PEFT_PREFIX)))
