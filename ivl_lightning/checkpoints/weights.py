"""All weights of a network in memory: gathered from shards, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

_AT_A_TIME = 8
"""Tensors that are gathered and hashed side by side."""


def memory_hash(model: nn.Module) -> str:
    """Hash of all weights as they lie in memory: a model may come from no folder.

    Args:
        model: may be sharded; then every rank must call it.
    """
    return tensors_hash(model.state_dict().items())


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, types, shapes and values, 16 hexadecimal digits; in whatever order they come.

    Args:
        named: tensors; sharded ones are gathered a few at a time, so every rank must call it.
    """
    rest, digests = iter(named), list[bytes]()
    with ThreadPoolExecutor() as pool:
        while group := list(islice(rest, _AT_A_TIME)):
            digests += pool.map(_digest, [(name, _whole(tensor)) for name, tensor in group])
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All parameters on the CPU of rank 0 (empty elsewhere); every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_model_state_dict(model, options=options)
    return {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
