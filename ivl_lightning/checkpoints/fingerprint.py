"""Whether weights that a checkpoint leaves out are those it was saved beside: names, shapes and some of the values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_VALUES = 64
"""Of each tensor, evenly spaced, the first and the last among them."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name -> dtype, shape and a checksum of some values of each tensor.

    Args:
        tensors: names and values. Of sharded ones only those values are gathered; every rank must call it.
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
    size = tensor.numel()
    places = torch.linspace(0, max(size - 1, 0), min(size, _VALUES), dtype=torch.float64).long()
    found = _of_all_ranks(tensor, places) if isinstance(tensor, DTensor) else _bytes_at(tensor, places)
    digest = hashlib.blake2b(found.cpu().flatten().numpy().data, digest_size=8)
    return f"{tensor.dtype} {list(tensor.shape)} {digest.hexdigest()}"


def _bytes_at(tensor: Tensor, places: Tensor) -> Tensor:
    """The values at some places of a flattened tensor, byte for byte: `[n, bytes of one]`."""
    values = tensor.reshape(-1)[places.to(tensor.device)]
    return values.contiguous().view(torch.uint8).view(len(places), tensor.element_size())


def _of_all_ranks(tensor: DTensor, places: Tensor) -> Tensor:
    """The same of a tensor whose rows lie on many ranks: each adds the bytes it holds to zeros."""
    local, row = tensor.to_local(), tensor.numel() // max(len(tensor), 1)
    _, (first, *_) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    own = places - first * row
    held = (own >= 0) & (own < local.numel())
    found = torch.zeros(len(places), tensor.element_size(), dtype=torch.uint8, device=local.device)
    found[held.to(local.device)] = _bytes_at(local, own[held])
    parts = [Partial() if placement.is_shard() else Replicate() for placement in tensor.placements]
    return DTensor.from_local(found, tensor.device_mesh, parts, run_check=False).full_tensor()
