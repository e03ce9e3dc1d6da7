"""FSDP2: which modules are sharded units, in which dtype they compute, and what is gathered ahead of time."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import InternVLForConditionalGeneration

from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower

_LIGHTNING_DIMENSION = "data_parallel"
_VERSIONS = 32
"""Of compiled code, at most."""


def shard_model(
    root: nn.Module,
    model: InternVLForConditionalGeneration,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    prefetch: int = 0,
) -> None:
    """Shard `root` in place over `mesh`.

    Every transformer block is a unit of its own, so that one block's weights are gathered at a time; so are the rest of
    the vision tower, and the projector. Embeddings and output head, which may be one, and the last norm stay with the
    root, whose forward gathers them once. So, without adapters, no unit has frozen and trained weights.

    Args:
        root: the module whose forward runs everything, loss head included.
        model: the network inside it, frozen where it shall be.
        mesh: as the strategy gives it, see `sharding_mesh`.
        param_dtype: dtype of gathered weights and of computation; shards and gradients stay float32.
        reshard_after_forward: free gathered weights until backward. What backward does not need is always freed.
        cpu_offload: shards, gradients and optimizer state lie in the memory of the host.
        prefetch: blocks gathered ahead of the one that runs; 0 leaves it to the library.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    mesh, backward = sharding_mesh(mesh), _units_of_backward(model)
    for unit in sharded_units(model):
        keep = not reshard_after_forward and unit in backward
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=not keep)
    fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    if prefetch:
        _prefetch(transformer_blocks(model), backward, prefetch)


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh to shard on: of one dimension, or of two, copies and shards of a copy.

    Args:
        mesh: of the strategy: `(replicate, shard)`, or Lightning's own `(data_parallel, tensor_parallel)`.
    """
    return mesh[_LIGHTNING_DIMENSION] if _LIGHTNING_DIMENSION in (mesh.mesh_dim_names or ()) else mesh


def sharded_units(model: InternVLForConditionalGeneration) -> list[nn.Module]:
    """The units below the root, inner ones first."""
    return [*transformer_blocks(model), vision_tower(model), model.model.multi_modal_projector]


def transformer_blocks(model: InternVLForConditionalGeneration) -> list[nn.Module]:
    """All blocks of vision tower and language model, in order of execution."""
    return [*vision_layers(vision_tower(model)), *language_layers(model)]


def compile_blocks(model: InternVLForConditionalGeneration) -> None:
    """Compile each transformer block in place, at its first use; names of parameters stay. Before sharding."""
    # Blocks of tower and language model count as one function, in training and in evaluation, and torch runs what goes
    # beyond its limit uncompiled.
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, _VERSIONS)
    for block in transformer_blocks(model):
        # Hardly two packs are equally long.
        block.compile(dynamic=True)


def reshard(root: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left gathered; nothing where nothing is sharded.

    Meanwhile the root's parameters (and with `reshard_after_forward=False` all) are whole, and in `param_dtype`.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _units_of_backward(model: InternVLForConditionalGeneration) -> set[nn.Module]:
    """Units whose weights a backward pass needs: those of the tower begin with the first block that trains."""
    tower = vision_tower(model)
    blocks = list(vision_layers(tower))
    first = next((place for place, block in enumerate(blocks) if _trains(block)), len(blocks))
    own = {tower} if _trains(tower) else set()
    return {*blocks[first:], *own, model.model.multi_modal_projector, *language_layers(model)}


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _prefetch(blocks: list[nn.Module], backward: set[nn.Module], count: int) -> None:
    ahead: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
    behind: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule) and block in backward]
    for place, block in enumerate(ahead):
        block.set_modules_to_forward_prefetch(ahead[place + 1 : place + 1 + count])
    for place, block in enumerate(behind):
        block.set_modules_to_backward_prefetch(behind[max(0, place - count) : place][::-1])
