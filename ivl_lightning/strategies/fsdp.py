"""FSDP2 under Lightning: what differs from Lightning's own strategy."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ivl_lightning.strategies.folder_checkpoints import FolderCheckpoints


class FSDP2Strategy(FolderCheckpoints, ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks, or inside groups of ranks of which each has a copy (HSDP).

    The strategy makes the device mesh; the stage shards itself on it in `configure_model` (see `models.shard`). Sizes
    are always given: the parent's `auto` means tensor parallelism inside a node.

    Args:
        num_ranks: all ranks, devices per node times nodes.
        timeout: a collective that takes longer ends the run.
        shard_size: adjacent ranks that share one copy of the weights, a divisor of `num_ranks`; None is all, on a
            mesh of the parent's.
        cpu_offload: shards stay in the memory of the host, where the stage has put them.
    """

    def __init__(
        self,
        num_ranks: int,
        timeout: timedelta = timedelta(minutes=30),
        *,
        shard_size: int | None = None,
        cpu_offload: bool = False,
    ) -> None:
        super().__init__(
            data_parallel_size=num_ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=True,
            timeout=timeout,
        )
        assert shard_size is None or num_ranks % shard_size == 0, (num_ranks, shard_size)
        self._num_ranks = num_ranks
        self._shard_size = shard_size
        self._cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Meet the other ranks and make the mesh: the parent's, or `(replicate, shard)`."""
        if self._shard_size is None:
            super().setup_environment()
            return
        self._setup_distributed()
        # A trainer sets up anew for each of fit and validate; groups of ranks stay.
        if self._device_mesh is None:
            shape = (self._num_ranks // self._shard_size, self._shard_size)
            self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has data of its own, whichever way weights are shared."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def model_to_device(self) -> None:
        """Move the model, but for shards that stay in the memory of the host."""
        if not self._cpu_offload:
            super().model_to_device()
            return
        device = self.root_device
        assert self.model is not None
        assert self.lightning_module is not None
        self.model._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(device))
        # What `to` would have noted, had it not moved the shards as well.
        self.lightning_module._device = device

    def _get_process_group_backend(self) -> str:
        """Norms of gradients that lie on the host are added up there, between CPUs."""
        if self._cpu_offload and self.root_device.type == "cuda" and self._process_group_backend is None:
            return "cpu:gloo,cuda:nccl"
        return super()._get_process_group_backend()
