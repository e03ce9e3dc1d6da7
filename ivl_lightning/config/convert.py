"""Settings of `ivl-convert` and `ivl-export`: what is read, what is written, what must be equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import Strict

Layout = Literal["hf", "original"]


@dataclass(kw_only=True)
class WriteConfig(Strict):
    """What both commands write.

    Attributes:
        target: folder to be written; must not exist, or be empty.
        layout: `hf` is transformers' own, `original` that of the first releases, which LMDeploy and vLLM know as well.
        dtype: floating-point tensors are cast to it; null keeps each as it is.
        template: chat template; null takes the source's own, else `internvl2_5`.
        shard_gb: gigabytes of a weight file at most.
        overwrite: replace a target that exists, once the new one is complete.
        logits: compare the outputs of source and target too; takes a forward pass of each.
        bound: largest difference of logits and image features allowed, in units of their standard deviation.
        memory_gb: a target whose float32 weights take less is loaded by transformers for that; a larger one is run
            layer by layer.
        threads: CPU threads; null leaves torch's choice.
        progress_bar: show one.
    """

    target: str
    layout: Layout = "hf"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    template: str | None = None
    shard_gb: float = 5.0
    overwrite: bool = False
    logits: bool = True
    bound: float = 1e-3
    memory_gb: float = 8.0
    threads: int | None = None
    progress_bar: bool = True


@dataclass(kw_only=True)
class ConvertConfig(WriteConfig):
    """`ivl-convert`.

    Attributes:
        source: folder of a checkpoint of either layout, or of an adapter in peft's format, which is merged.
    """

    source: str


@dataclass(kw_only=True)
class ExportConfig(WriteConfig):
    """`ivl-export`.

    Attributes:
        run: folder of a run, or of one of its stages.
        stage: of the run; null takes the one that finished last.
        checkpoint: `weights` (written when a stage ends), or `newest` or the name of one in the stage's `checkpoints`.
        adapter: of a stage that trained with LoRA: `merged`, or written `beside` its base model, in a subfolder.
    """

    run: str
    stage: str | None = None
    checkpoint: str = "weights"
    adapter: Literal["merged", "beside"] = "merged"


def check_write(config: WriteConfig) -> None:
    """Check numbers.

    Raises:
        ConfigError: lists every fault.
    """
    faults = [
        f"{name}={value} must be above 0"
        for name, value in (("shard_gb", config.shard_gb), ("bound", config.bound))
        if value <= 0
    ]
    if config.memory_gb < 0:
        faults.append(f"memory_gb={config.memory_gb} must not be negative")
    if faults:
        raise ConfigError("\n".join(faults))
