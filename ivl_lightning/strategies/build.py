"""A strategy by its name in the config."""

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, Strategy

from ivl_lightning.config.schema import StrategyConfig
from ivl_lightning.strategies.fsdp import FSDP2Strategy


def build_strategy(config: StrategyConfig, *, num_ranks: int) -> Strategy | str:
    """What `Trainer(strategy=...)` takes; `auto` for one process."""
    timeout = timedelta(minutes=config.timeout_minutes)
    if config.name == "ddp":
        # Stages leave no trainable parameter without a gradient, so no search for unused ones is needed.
        return DDPStrategy(timeout=timeout)
    if config.name == "fsdp":
        return FSDP2Strategy(num_ranks, timeout)
    return "auto"
