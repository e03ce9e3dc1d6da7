"""All weights of a network in memory: gathered from shards, and their hash."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


def memory_hash(model: nn.Module) -> str:
    """Hash of names, types and values of all weights as they lie in memory: a model may come from no folder.

    Args:
        model: not sharded.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All parameters on the CPU of rank 0 (empty elsewhere); every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_model_state_dict(model, options=options)
    return {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
