"""Rotary positions of the original's four language model classes.

Source of the rules: `modeling_internlm2.py` and `modeling_phi3.py` of OpenGVLab/InternVL, commit 2410d1d, and for Llama
and Qwen2 the transformers library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ivl_lightning.conversion.official_primitives import Section, UnsupportedError

Scaling = Callable[[Section, Mapping[str, Any], Tensor, int], tuple[Tensor, float]]
"""From settings, `rope_scaling`, frequencies `[d/2]` and length: scaled frequencies, and what cos and sin are times."""


def rotation(
    settings: Section, scalings: Mapping[str, Scaling], length: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of p * f_i at the positions p = 0 to length - 1, with f_i = theta^(-2i/d) before scaling.

    Args:
        settings: `rope_theta`, `rope_scaling`, and what the scaling needs.
        scalings: kinds that the model class knows.
        length: positions.
        head_dim: d.
        device: of the result.

    Returns:
        Two `[length, d/2]`.

    Raises:
        UnsupportedError: a scaling that the model class does not know, a key of it without a rule, or a length at which
            the frequencies would depend on the length.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies, amplitude = 1.0 / settings["rope_theta"] ** exponents, 1.0
    if settings["rope_scaling"] is not None:
        scaling = settings["rope_scaling"]
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in scalings:
            raise UnsupportedError(f"{settings.path}rope_scaling", scaling, f"the types {', '.join(scalings)}")
        _check_keys(settings, scaling, kind)
        frequencies, amplitude = scalings[kind](settings, scaling, frequencies, length)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) by the angles of their position.

    Args:
        x: `[heads, L, d]`.
        cos: `[L, d/2]`, as is sin.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def dynamic(settings: Section, scaling: Mapping[str, Any], frequencies: Tensor, length: int) -> tuple[Tensor, float]:
    """Unchanged up to `max_position_embeddings`; beyond, the base depends on the length, which has no rule here."""
    limit = settings["max_position_embeddings"]
    if length > limit:
        raise UnsupportedError(
            f"{settings.path}rope_scaling", dict(scaling), f"it up to {limit} tokens only; there are {length}"
        )
    return frequencies, 1.0


def interpolated(
    settings: Section, scaling: Mapping[str, Any], frequencies: Tensor, length: int
) -> tuple[Tensor, float]:
    """`linear`: all frequencies divided by the factor."""
    return frequencies / scaling["factor"], 1.0


def llama3(settings: Section, scaling: Mapping[str, Any], frequencies: Tensor, length: int) -> tuple[Tensor, float]:
    """Low frequencies are divided by the factor, high ones are not, those between are blended.

    With L the original length and n = L f / 2 pi the turns within it, a frequency keeps the share
    s = clamp((n - low) / (high - low), 0, 1): f' = s f + (1 - s) f / factor.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = frequencies * scaling["original_max_position_embeddings"] / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"], 1.0


def longrope(settings: Section, scaling: Mapping[str, Any], frequencies: Tensor, length: int) -> tuple[Tensor, float]:
    """Phi-3's `su`, later called `longrope`: each frequency is divided by a factor of its own.

    The long factors apply to inputs beyond `original_max_position_embeddings`, the short ones to all others. At any
    length cos and sin are times sqrt(1 + ln(m / o) / ln(o)), m and o the maximum and the original maximum, if m > o.
    """
    original = settings["original_max_position_embeddings"]
    factors = scaling["long_factor" if length > original else "short_factor"]
    stretch = settings["max_position_embeddings"] / original
    amplitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return frequencies / torch.tensor(factors, dtype=torch.float32, device=frequencies.device), amplitude


_KEYS = {
    "dynamic": {"factor"},
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "su": {"short_factor", "long_factor"},
    "longrope": {"short_factor", "long_factor"},
}


def _check_keys(settings: Section, scaling: Mapping[str, Any], kind: str) -> None:
    for key in sorted(scaling.keys() - _KEYS[kind] - {"type", "rope_type"}):
        raise UnsupportedError(f"{settings.path}rope_scaling.{key}", scaling[key], ", ".join(sorted(_KEYS[kind])))
