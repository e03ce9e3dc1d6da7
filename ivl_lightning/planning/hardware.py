"""What accelerators can do, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from ivl_lightning.config.plan import GpuName

GB = 1e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """An accelerator.

    Attributes:
        title: for people.
        bfloat16: peak FLOP/s of the matrix units, dense.
        float32: peak FLOP/s without them: torch multiplies float32 so unless told otherwise.
        memory: bytes.
        memory_speed: bytes/s of its own memory.
        link: bytes/s to the other GPUs of its node, one way.
    """

    title: str
    bfloat16: float
    float32: float
    memory: float
    memory_speed: float
    link: float


# Source: NVIDIA's data sheets of each card, dense figures (half of those "with sparsity"), NVLink one way (half of the
# total), memory in units of 10^9 bytes as sold. The L40S has no NVLink: PCIe 4.0 x16.
GPUS: dict[GpuName, Gpu] = {
    "h100": Gpu("H100 SXM 80 GB", 989e12, 67e12, 80 * GB, 3350 * GB, 450 * GB),
    "h200": Gpu("H200 SXM 141 GB", 989e12, 67e12, 141 * GB, 4800 * GB, 450 * GB),
    "b200": Gpu("B200 180 GB", 2250e12, 80e12, 180 * GB, 8000 * GB, 900 * GB),
    "a100_80gb": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 80 * GB, 2039 * GB, 300 * GB),
    "a100_40gb": Gpu("A100 SXM 40 GB", 312e12, 19.5e12, 40 * GB, 1555 * GB, 300 * GB),
    "l40s": Gpu("L40S 48 GB", 362e12, 91.6e12, 48 * GB, 864 * GB, 32 * GB),
}

# As torch names them. Other builds of the same chip (an H100 with PCIe, a slice of one) have other peaks.
_DEVICE_NAMES: dict[str, GpuName] = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100_80gb",
    "NVIDIA A100 80GB PCIe": "a100_80gb",
    "NVIDIA A100-SXM4-40GB": "a100_40gb",
    "NVIDIA A100-PCIE-40GB": "a100_40gb",
    "NVIDIA L40S": "l40s",
}


def gpu_named(name: str) -> Gpu | None:
    """The accelerator of a device name; None where its data sheet is not among these."""
    return GPUS[_DEVICE_NAMES[name]] if name in _DEVICE_NAMES else None
