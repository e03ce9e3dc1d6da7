"""A strategy by its name in the config."""

from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from ivl_lightning.config.schema import StrategyConfig
from ivl_lightning.strategies.folder_checkpoints import FolderCheckpoints
from ivl_lightning.strategies.fsdp import FSDP2Strategy


class OneProcess(FolderCheckpoints, SingleDeviceStrategy):
    """One process on one device."""


class DataParallel(FolderCheckpoints, DDPStrategy):
    """A copy of the network per rank; gradients are averaged."""


def build_strategy(
    config: StrategyConfig, *, num_ranks: int, num_nodes: int = 1, accelerator: str = "auto"
) -> FolderCheckpoints:
    """What `Trainer(strategy=...)` takes.

    Args:
        config: its name and switches.
        num_ranks: all ranks, devices per node times nodes.
        num_nodes: nodes, of which HSDP lets each have a copy unless it is told otherwise.
        accelerator: as `Trainer(accelerator=...)` has it; decides the device of one process.
    """
    timeout = timedelta(minutes=config.timeout_minutes)
    if config.name == "ddp":
        # Stages leave no trainable parameter without a gradient, so no search for unused ones is needed.
        return DataParallel(timeout=timeout)
    if config.name == "fsdp":
        return FSDP2Strategy(num_ranks, timeout, cpu_offload=config.cpu_offload)
    if config.name == "hsdp":
        shard_size = config.shard_size or num_ranks // num_nodes
        return FSDP2Strategy(num_ranks, timeout, shard_size=shard_size, cpu_offload=config.cpu_offload)
    return OneProcess(device=_device(accelerator))


def _device(accelerator: str) -> torch.device:
    found = None if accelerator == "cpu" else torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None else torch.device(found.type, 0)
