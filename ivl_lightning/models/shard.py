"""FSDP2: which modules are sharded units, and in which dtype they compute."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import InternVLForConditionalGeneration

from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower


def shard_model(
    root: nn.Module,
    model: InternVLForConditionalGeneration,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> None:
    """Shard `root` in place over `mesh`.

    Every transformer block is a unit of its own, so that one block's weights are gathered at a time; embeddings,
    projector and output head stay with the root, which the root's forward gathers once. Frozen and trained modules
    never share a unit below the root: FSDP2 keeps them as separate parameters.

    Args:
        root: the module whose forward runs everything, loss head included.
        model: the network inside it.
        mesh: one-dimensional data-parallel mesh.
        param_dtype: dtype of gathered weights and of computation; shards and gradients stay float32.
        reshard_after_forward: free gathered weights until backward.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def reshard(root: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left gathered; nothing where nothing is sharded.

    Meanwhile the root's parameters (and with `reshard_after_forward=False` all) are whole, and in `param_dtype`.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def transformer_blocks(model: InternVLForConditionalGeneration) -> list[nn.Module]:
    """All blocks of vision tower and language model, in order of execution."""
    return [*vision_layers(vision_tower(model)), *language_layers(model)]
