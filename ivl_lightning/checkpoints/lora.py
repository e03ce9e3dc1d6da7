"""LoRA adapters in a state dict, as names and tensors: which belong together, and their merge into plain weights.

Read are the names that peft gives: `X.base_layer.weight` (`X.weight` in older versions), `X.lora_A.NAME.weight` and
`X.lora_B.NAME.weight` (without NAME in adapter files), and `base_model.model.` in front of the names of a module that
is wrapped, as in the original's checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_BASE_LAYER = ".base_layer."
_WRAPPER = re.compile(r"(?:^|(?<=\.))base_model\.model\.")


class LoraGroup(NamedTuple):
    """Names of the tensors that become one: the base, and the adapter's two where there is one."""

    base: str
    a: str | None
    b: str | None


def lora_groups(names: Iterable[str]) -> dict[str, LoraGroup]:
    """Name of each plain tensor -> names of the tensors it is made of; in the order of the names.

    Args:
        names: of a whole state dict, adapted or not.

    Raises:
        ValueError: half an adapter, two adapters of one layer, an adapter without the weights it belongs to, two
            tensors for one name, or adapters of another kind than plain LoRA.
    """
    bases: dict[str, str] = {}
    sides: dict[str, dict[str, str]] = {}
    for name in names:
        match = _ADAPTER.fullmatch(name)
        if match is not None:
            _note(sides.setdefault(f"{_plain(match['layer'])}.weight", {}), match["side"], name)
        elif ".lora_" in name:
            raise ValueError(f"{name} is no part of a plain LoRA adapter (lora_A and lora_B weights): cannot be merged")
        else:
            _note(bases, _plain(name), name)
    for target, found in sides.items():
        _check_whole(target, found, bases)
    return {
        target: LoraGroup(base, sides.get(target, {}).get("A"), sides.get(target, {}).get("B"))
        for target, base in bases.items()
    }


def merge(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, computed in float32 and given back in the base's dtype.

    Args:
        base: W `[out, in]`.
        a: A `[rank, in]`.
        b: B `[out, rank]`.
        scale: alpha / rank.

    Raises:
        ValueError: shapes that do not fit.
    """
    if not (base.ndim == a.ndim == b.ndim == 2) or b.shape[1] != a.shape[0] or base.shape != (b.shape[0], a.shape[1]):
        raise ValueError(
            f"LoRA: a weight of shape {tuple(base.shape)} cannot take A of shape {tuple(a.shape)} and B of shape "
            f"{tuple(b.shape)}: [out, in] needs [rank, in] and [out, rank]"
        )
    return torch.add(base.float(), b.float() @ a.float(), alpha=scale).to(base.dtype)


def merged_state_dict(state_dict: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """All tensors under their plain names, adapters merged; `state_dict` is used up, so that nothing is held twice.

    Raises:
        ValueError: see `lora_groups` and `merge`; names the tensor.
    """
    return {
        target: _merged(target, group, state_dict, scale) for target, group in lora_groups(tuple(state_dict)).items()
    }


def _merged(target: str, group: LoraGroup, state_dict: dict[str, Tensor], scale: float) -> Tensor:
    base = state_dict.pop(group.base)
    if group.a is None or group.b is None:
        return base
    try:
        return merge(base, state_dict.pop(group.a), state_dict.pop(group.b), scale)
    except ValueError as error:
        raise ValueError(f"{target}: {error}") from None


def adapter_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters alone, under the names that peft's files have: without the adapter's own name."""
    found = {name: _ADAPTER.fullmatch(name) for name in state_dict}
    return {
        f"base_model.model.{match['layer']}.lora_{match['side']}.weight": state_dict[name]
        for name, match in found.items()
        if match is not None
    }


def _plain(name: str) -> str:
    """The name that a tensor or layer has where nothing is adapted."""
    return _WRAPPER.sub("", name.replace(_BASE_LAYER, "."))


def _note(found: dict[str, str], key: str, name: str) -> None:
    if key in found:
        raise ValueError(f"{found[key]} and {name} are two tensors for one place: only one adapter can be merged")
    found[key] = name


def _check_whole(target: str, sides: dict[str, str], bases: dict[str, str]) -> None:
    if len(sides) < 2:
        (found,) = sides.values()
        raise ValueError(f"{found} has no counterpart lora_{'B' if 'A' in sides else 'A'}: half an adapter")
    if target not in bases:
        raise ValueError(f"{sides['A']} adapts {target}, which is not there: the adapter belongs to another model")
