"""Whether weights that a checkpoint leaves out are those it was saved beside: names, shapes and some of the values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_VALUES = 64
"""Of each tensor, evenly spaced, the first and the last among them."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name -> dtype, shape and a checksum of some values of each tensor.

    Args:
        tensors: names and values, not sharded.
    """
    return {name: _print(tensor.detach()) for name, tensor in tensors}


def check_fingerprint(then: Mapping[str, str], now: Mapping[str, str], where: str) -> None:
    """Two fingerprints must be the same.

    Args:
        then: that of the checkpoint.
        now: that of the network at hand.
        where: the message's first words, such as `the checkpoint was saved beside`.

    Raises:
        ValueError: names the first tensor that differs, and how many do.
    """
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"{where} a different base: {len(different)} of {len({**then, **now})} frozen tensors differ, first {name} "
            f"({then.get(name, 'not frozen')} then, {now.get(name, 'not frozen')} now). Start from the same weights, "
            "with the same lora and stage.trainable"
        )


def _print(tensor: Tensor) -> str:
    flat = tensor.reshape(-1)
    places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _VALUES), dtype=torch.float64).long()
    values = flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.blake2b(values.data, digest_size=8).hexdigest()}"
