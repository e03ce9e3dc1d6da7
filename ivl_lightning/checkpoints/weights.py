"""Write a folder of weights, whole or not at all, also from sharded parameters."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def save_weights(
    model: PreTrainedModel, state_dict: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Config, safetensors and tokenizer in the layout transformers reads; written aside, then renamed."""
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, state_dict=state_dict)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.replace(folder)
