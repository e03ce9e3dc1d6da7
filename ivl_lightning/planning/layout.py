"""How a step is spread over ranks, and in which types it computes; taken from a stage's settings."""

from __future__ import annotations

from dataclasses import dataclass

from ivl_lightning.config.schema import RunConfig

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""

_BYTES = {"float32": FLOAT32, "bfloat16": BFLOAT16}


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks and types.

    Attributes:
        strategy: `single`, `ddp`, `fsdp` or `hsdp`.
        ranks: all of them.
        per_node: GPUs of a node.
        shards: ranks that share one copy of the weights.
        accumulation: micro-batches of a rank in a step.
        compute: bytes of a number in matrix products.
        residual: bytes of a number between blocks.
        autocast: whether float32 weights are cast for each product.
        sync_every: whether gradients are reduced with every micro-batch.
        reshard: whether gathered weights are freed between forward and backward.
        offload: whether shards lie in the host's memory.
        prefetch: blocks gathered ahead.
        checkpointing: whether blocks are computed again in backward.
    """

    strategy: str
    ranks: int
    per_node: int
    shards: int
    accumulation: int
    compute: int
    residual: int
    autocast: bool
    sync_every: bool
    reshard: bool
    offload: bool
    prefetch: int
    checkpointing: bool

    @property
    def sharded(self) -> bool:
        """Whether FSDP is at work."""
        return self.strategy in ("fsdp", "hsdp")

    @property
    def whole_gradients(self) -> bool:
        """Whether every rank keeps the gradients of all shards between its micro-batches."""
        return self.sharded and self.accumulation > 1 and not self.sync_every


def layout_of(config: RunConfig) -> Layout:
    """The layout of a stage; its settings have been checked."""
    trainer, strategy = config.trainer, config.strategy
    ranks = trainer.devices * trainer.num_nodes
    sharded = strategy.name in ("fsdp", "hsdp")
    autocast = not sharded and trainer.precision == "bf16-mixed" and config.model.dtype == "float32"
    own = _BYTES[strategy.param_dtype if sharded else config.model.dtype]
    return Layout(
        strategy=strategy.name,
        ranks=ranks,
        per_node=trainer.devices,
        shards=_shards(config, ranks),
        accumulation=max(config.data.packs_per_step // ranks, 1),
        compute=BFLOAT16 if autocast else own,
        residual=FLOAT32 if autocast else own,
        autocast=autocast,
        sync_every=strategy.sync_every_micro_batch,
        reshard=strategy.reshard_after_forward,
        offload=sharded and strategy.cpu_offload,
        prefetch=strategy.prefetch,
        checkpointing=config.model.activation_checkpointing,
    )


def _shards(config: RunConfig, ranks: int) -> int:
    if config.strategy.name == "fsdp":
        return ranks
    if config.strategy.name == "hsdp":
        return config.strategy.shard_size or config.trainer.devices
    return 1
