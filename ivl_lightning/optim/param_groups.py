"""Optimizer groups: learning rate and weight decay by part, and slower lower vision layers if wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn import Parameter

_VISION_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
_EMBEDDINGS = ("embed_tokens", "cls_token", "position_embeddings")


def parameter_groups(
    named_parameters: Mapping[str, Iterable[tuple[str, Parameter]]],
    *,
    lr: Mapping[str, float],
    weight_decay: Mapping[str, float],
    decay: str = "matrices",
    vision_layers: int = 0,
    vision_layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer; frozen parameters are left out, so they get no state.

    Args:
        named_parameters: part name -> its named parameters.
        lr: part -> peak learning rate.
        weight_decay: part -> weight decay.
        decay: `matrices` decays weight matrices and kernels alone; `all` decays everything, as the original does.
        vision_layers: layers of the vision tower.
        vision_layer_decay: rate d of layer-wise decay: layer i of L learns at lr * d^(L - 1 - i), the embeddings
            at lr * d^L. Source: internvl_g of the original.

    Returns:
        groups with `params`, `lr`, `weight_decay` and a `name` such as `vision` or `llm_no_decay`.

    Raises:
        ValueError: `decay` is neither of the two.
    """
    if decay not in ("matrices", "all"):
        raise ValueError(f"optim.decay={decay!r} is not known: use matrices or all")
    groups: dict[tuple[str, bool, float], list[Parameter]] = {}
    for part, parameters in named_parameters.items():
        for name, parameter in parameters:
            if not parameter.requires_grad:
                continue
            decays = decay == "all" or _is_matrix(name, parameter)
            scale = _layer_scale(name, vision_layers, vision_layer_decay) if part == "vision" else 1.0
            groups.setdefault((part, decays, scale), []).append(parameter)
    return [
        {
            "name": _group_name(part, decays, scale),
            "params": parameters,
            "lr": lr[part] * scale,
            "weight_decay": weight_decay[part] if decays else 0.0,
        }
        for (part, decays, scale), parameters in groups.items()
    ]


def _is_matrix(name: str, parameter: Parameter) -> bool:
    return parameter.ndim >= 2 and not any(embedding in name for embedding in _EMBEDDINGS)


def _layer_scale(name: str, num_layers: int, rate: float) -> float:
    if rate == 1.0:
        return 1.0
    match = _VISION_LAYER.search(name)
    below_top = num_layers - 1 - int(match.group(1)) if match else num_layers
    return rate**below_top


def _group_name(part: str, decays: bool, scale: float) -> str:
    suffix = "" if decays else "_no_decay"
    return f"{part}{suffix}" if scale == 1.0 else f"{part}{suffix}_x{scale:.4g}"
