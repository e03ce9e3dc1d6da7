"""Rules of the LoRA settings: what trains with adapters, and what contradicts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import LoraSettings, Part, RunConfig


def trained_parts(trainable: Sequence[Part] | None, lora: LoraSettings, default: Sequence[Part]) -> tuple[Part, ...]:
    """Parts that get gradients, in full or through adapters.

    Args:
        trainable: the configured ones; None takes those with adapters, or without LoRA the stage's own choice.
        lora: the adapters.
        default: the stage's own choice.

    Raises:
        ConfigError: `trainable` leaves out a part that gets adapters.
    """
    if not trainable:
        return tuple(lora.parts or default)
    left_out = [part for part in lora.parts if part not in trainable]
    if left_out:
        raise ConfigError(_left_out(trainable, lora, left_out))
    return tuple(trainable)


def fully_trained(trained: Sequence[Part], lora: LoraSettings) -> tuple[Part, ...]:
    """Those of the trained parts whose own weights train."""
    return tuple(part for part in trained if part not in lora.parts)


def settings_faults(lora: LoraSettings) -> list[str]:
    """What is wrong with the settings by themselves."""
    if not lora.parts:
        return _without_parts(lora)
    faults = []
    if len(set(lora.parts)) < len(lora.parts):
        faults.append(f"lora.parts={lora.parts} names a part twice")
    if lora.rank < 1:
        faults.append(f"lora.rank={lora.rank} must be at least 1")
    if lora.alpha is not None and lora.alpha < 1:
        faults.append(f"lora.alpha={lora.alpha} must be at least 1, or null for 2 * rank")
    if not 0.0 <= lora.dropout < 1.0:
        faults.append(f"lora.dropout={lora.dropout} must be at least 0 and below 1")
    for part, names in lora.targets.items():
        if names == []:
            faults.append(f"lora.targets.{part}=[] gives no layer an adapter: null takes the official ones")
        if names and part not in lora.parts:
            faults.append(f"lora.targets.{part}={names} has no effect with lora.parts={lora.parts}: add {part} to it")
    if lora.quantize is not None and "llm" not in lora.parts:
        faults.append(f"lora.quantize={lora.quantize} is for the language model, but lora.parts={lora.parts}: add llm")
    return faults


def _without_parts(lora: LoraSettings) -> list[str]:
    """Settings that somebody gave who forgot to say which part gets adapters."""
    unused = LoraSettings()
    given = {
        field.name: getattr(lora, field.name)
        for field in fields(lora)
        if getattr(lora, field.name) != getattr(unused, field.name)
    }
    return [
        f"lora.{name}={value} has no effect with lora.parts=[]: add lora=llm, lora=vision or lora=all"
        for name, value in given.items()
    ]


def lora_faults(config: RunConfig) -> list[str]:
    """What is wrong with the settings, by themselves and beside others."""
    lora, stage = config.lora, config.stage
    faults = settings_faults(lora)
    left_out = [part for part in lora.parts if stage.trainable and part not in stage.trainable]
    if left_out:
        faults.append(_left_out(stage.trainable or (), lora, left_out))
    if stage.trainable_vision_layers is not None and "vision" in lora.parts:
        faults.append(
            f"stage.trainable_vision_layers={stage.trainable_vision_layers} chooses layers that train in full, but "
            f"lora.parts={lora.parts} freezes them: set one of the two to null or []"
        )
    if lora.quantize is not None and config.strategy.name in ("fsdp", "hsdp"):
        faults.append(
            f"lora.quantize={lora.quantize} cannot be sharded by strategy={config.strategy.name}, which would part "
            "4-bit weights from what they are scaled by: use strategy=single or strategy=ddp, or lora=llm"
        )
    if stage.rows == "pairs" and config.preference.reference == "adapter_off":
        faults += adapter_off_faults(trained=stage.trainable or lora.parts, lora=lora)
    return faults


def adapter_off_faults(trained: Sequence[Part], lora: LoraSettings) -> list[str]:
    """Why the network without its adapters is not the reference model.

    Args:
        trained: parts that get gradients.
        lora: the adapters.
    """
    if not lora.parts:
        return [
            "preference.reference=adapter_off needs adapters, but lora.parts=[]: add lora=llm, or use "
            "preference.reference=cached or online"
        ]
    moving = fully_trained(trained, lora)
    if moving:
        return [
            f"preference.reference=adapter_off, but stage.trainable={list(trained)} trains {', '.join(moving)} in "
            f"full beside lora.parts={lora.parts}, so the network without adapters would move: set stage.trainable="
            "null, or use preference.reference=cached or online"
        ]
    return []


def _left_out(trainable: Sequence[Part], lora: LoraSettings, left_out: Sequence[Part]) -> str:
    return (
        f"stage.trainable={list(trainable)} leaves out {', '.join(left_out)} of lora.parts={lora.parts}: add it, or "
        "set stage.trainable=null to train the adapters alone"
    )
