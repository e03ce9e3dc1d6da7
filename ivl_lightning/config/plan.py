"""Settings of the forecast, `ivl-plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import Strict

GpuName = Literal["h100", "h200", "b200", "a100_80gb", "a100_40gb", "l40s"]


@dataclass(kw_only=True)
class PlanConfig(Strict):
    """What `ivl-plan` takes for granted; given as `plan.NAME=VALUE` beside the arguments of `train.py`.

    Attributes:
        gpu: the accelerator, SXM where there are several (docs/scale.md has its numbers).
        mfu: share of its peak at which it works on what is executed, repeated forward passes included.
        reserve_gb: GB of GPU memory for the CUDA context, NCCL and workspaces of kernels.
        fragmentation: share of activations that the allocator needs on top.
        network_gb: GB/s between nodes for each GPU, one way; 50 is 400 Gb/s.
        host_link_gb: GB/s between GPU and host, one way, for `strategy.cpu_offload`.
        storage_gb: GB/s at which all ranks together write a checkpoint.
        label_share: supervised share of the tokens where the data are not measured.
        planned_packs: packs of the first epoch that are planned to see what packs hold, where the data are measured.
        json: file that gets the forecast too, with every number; null writes none.
    """

    gpu: GpuName = "h100"
    mfu: float = 0.4
    reserve_gb: float = 3.0
    fragmentation: float = 0.1
    network_gb: float = 50.0
    host_link_gb: float = 50.0
    storage_gb: float = 5.0
    label_share: float = 0.15
    planned_packs: int = 2048
    json: str | None = None


def check_plan(plan: PlanConfig) -> None:
    """Check the numbers.

    Raises:
        ConfigError: lists what is out of range.
    """
    faults = []
    if not 0.0 < plan.mfu <= 1.0:
        faults.append(f"plan.mfu={plan.mfu} must be above 0 and at most 1: 0.4 is usual")
    for name in ("reserve_gb", "fragmentation", "label_share"):
        if getattr(plan, name) < 0.0:
            faults.append(f"plan.{name}={getattr(plan, name)} must be at least 0")
    for name in ("network_gb", "host_link_gb", "storage_gb", "planned_packs"):
        if getattr(plan, name) <= 0:
            faults.append(f"plan.{name}={getattr(plan, name)} must be above 0")
    if plan.label_share > 1.0:
        faults.append(f"plan.label_share={plan.label_share} is a share of at most 1")
    if faults:
        raise ConfigError("\n".join(faults))
