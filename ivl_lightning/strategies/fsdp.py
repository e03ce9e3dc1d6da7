"""FSDP2 under Lightning: what differs from Lightning's own strategy."""

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks.

    The parent makes the device mesh; the stage shards itself on it in `configure_model` (see `models.shard`). Sizes
    are always given: the parent's `auto` means tensor parallelism inside a node.

    Args:
        num_ranks: all ranks, devices per node times nodes.
        timeout: a collective that takes longer ends the run.
    """

    def __init__(self, num_ranks: int, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(
            data_parallel_size=num_ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=True,
            timeout=timeout,
        )
