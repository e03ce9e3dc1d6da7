"""What both halves of the reference forward pass share: settings with the original's defaults, and four operations.

The `official_*` modules are the yardstick of a conversion, so they import torch and each other only. Source of the
rules: the modeling code of OpenGVLab/InternVL, commit 2410d1d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

Read = Callable[[str], Tensor]
"""Gives the tensor of an original name, in any floating type; raises what it likes if there is none."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "silu": silu}


class UnsupportedError(ValueError):
    """A setting of the checkpoint for which the reference forward pass has no rule.

    Args:
        field: path of the setting in config.json.
        value: what stands there.
        known: what could stand there.
    """

    def __init__(self, field: str, value: object, known: str) -> None:
        super().__init__(f"{field}={value!r} is not covered by the reference forward pass: it knows {known}")


@dataclass(frozen=True, slots=True)
class Section:
    """A section of config.json over the defaults of its original class.

    Args:
        path: what precedes a field's name in messages, as `vision_config.`.
        given: the section as the file has it; fields that no rule needs may be there.
        defaults: a value for each field that a rule needs.
    """

    path: str
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __getitem__(self, field: str) -> Any:
        return self.given.get(field, self.defaults[field])

    def one_of(self, field: str, *known: object) -> Any:
        """The field's value.

        Raises:
            UnsupportedError: it is none of `known`.
        """
        value = self[field]
        if value not in known:
            raise UnsupportedError(f"{self.path}{field}", value, ", ".join(map(repr, known)))
        return value

    def activation(self) -> Callable[[Tensor], Tensor]:
        """The function that `hidden_act` names; `gelu` is the exact one, with erf.

        Raises:
            UnsupportedError: another one.
        """
        return _ACTIVATIONS[self.one_of("hidden_act", *_ACTIVATIONS)]


def read_float(read: Read, name: str) -> Tensor:
    """The tensor in float32."""
    return read(name).float()


def linear_at(read: Read, name: str, x: Tensor, *, bias: bool) -> Tensor:
    """x W^T + b with `name.weight` [out, in] and, if there is a bias, `name.bias` [out].

    Args:
        x: `[..., in]`.

    Returns:
        `[..., out]`.
    """
    return linear(x, read_float(read, f"{name}.weight"), read_float(read, f"{name}.bias") if bias else None)


def rms_norm_at(read: Read, name: str, x: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last dimension, with `name.weight` as w.

    Args:
        x: `[..., width]`, float32.
    """
    return read_float(read, f"{name}.weight") * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[..., L, heads * d]` to `[..., heads, L, d]`; a head's values lie side by side."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """`[..., heads, L, d]` to `[..., L, heads * d]`."""
    return x.transpose(-3, -2).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out.

    Args:
        query: `[..., heads, L, d]`, as are key and value.
        causal: position i sees positions 0 to i only.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(dim=-1) @ value
