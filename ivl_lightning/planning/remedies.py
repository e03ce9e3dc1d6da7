"""What to change where a stage does not fit, in the order in which it costs least, each with what it would give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ivl_lightning.config.schema import RunConfig
from ivl_lightning.planning.forecast import Forecast

_SMALL_CHUNK = 1024
_MOST_RANKS = 4096

_NODE = 8
"""GPUs of the usual node."""

Make = Callable[[RunConfig], Forecast]
Change = Callable[[RunConfig], RunConfig]


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change.

    Attributes:
        settings: what to write on the command line.
        added: whether later changes come on top of it.
        forecast: with it.
    """

    settings: str
    added: bool
    forecast: Forecast


def remedies(config: RunConfig, make: Make) -> list[Remedy]:
    """Changes that save memory: first those that cost little, one on top of the other; then dear ones by themselves.

    Cheap ones end with the first that fits. Those that save nothing are left out.

    Args:
        config: of a stage that does not fit.
        make: forecasts a changed stage.
    """
    found: list[Remedy] = []
    best = make(config)
    for settings, changed in _cheap(config):
        forecast = make(changed(config))
        if forecast.memory.peak >= best.memory.peak:
            continue
        config, best = changed(config), forecast
        found.append(Remedy(settings, True, forecast))
        if forecast.fits:
            return found
    for settings, other in _dear(config):
        forecast = make(other)
        if forecast.memory.peak < best.memory.peak:
            found.append(Remedy(settings, False, forecast))
    return [*found, *_more_ranks(config, make)]


def _cheap(config: RunConfig) -> Iterator[tuple[str, Change]]:
    """Settings and what they change; each is asked for with the ones before it in place."""
    if not config.model.activation_checkpointing:
        yield "model.activation_checkpointing=true", lambda c: _model(c, activation_checkpointing=True)
    if config.lora.parts and config.model.dtype == "float32":
        # Adapters stay float32.
        yield "model.dtype=bfloat16", lambda c: _model(c, dtype="bfloat16")
    if config.strategy.name not in ("fsdp", "hsdp"):
        yield from _into_shards(config)
    else:
        yield from _smaller_shards(config)
    group = "preference" if config.stage.rows == "pairs" else "loss"
    if getattr(config, group).chunk_rows > _SMALL_CHUNK:
        yield f"{group}.chunk_rows={_SMALL_CHUNK}", lambda c: _group(c, group, chunk_rows=_SMALL_CHUNK)
    if config.stage.rows == "pairs" and config.preference.reference == "online":
        yield "preference.reference=cached", lambda c: _group(c, "preference", reference="cached")


def _into_shards(config: RunConfig) -> Iterator[tuple[str, Change]]:
    """From whole copies to shards; where there is one rank, or 4 bits that cannot be sharded, to half the bytes."""
    trainer, model = config.trainer, config.model
    if trainer.devices * trainer.num_nodes == 1 or config.lora.quantize is not None:
        if trainer.precision == "32-true" and model.dtype == "float32":
            yield "trainer.precision=bf16-mixed", lambda c: _group(c, "trainer", precision="bf16-mixed")
        return
    precision = "" if trainer.precision == "32-true" else " trainer.precision=32-true"
    yield f"strategy=fsdp strategy.param_dtype=bfloat16{precision}", _fully_sharded
    yield "strategy.sync_every_micro_batch=true", lambda c: _group(c, "strategy", sync_every_micro_batch=True)


def _fully_sharded(config: RunConfig) -> RunConfig:
    return _group(_group(config, "trainer", precision="32-true"), "strategy", name="fsdp", param_dtype="bfloat16")


def _smaller_shards(config: RunConfig) -> Iterator[tuple[str, Change]]:
    strategy = config.strategy
    if strategy.param_dtype == "float32":
        yield "strategy.param_dtype=bfloat16", lambda c: _group(c, "strategy", param_dtype="bfloat16")
    if not strategy.reshard_after_forward:
        yield "strategy.reshard_after_forward=true", lambda c: _group(c, "strategy", reshard_after_forward=True)
    if not strategy.sync_every_micro_batch:
        yield "strategy.sync_every_micro_batch=true", lambda c: _group(c, "strategy", sync_every_micro_batch=True)
    if strategy.name == "hsdp":
        yield "strategy=fsdp", lambda c: _group(c, "strategy", name="fsdp", shard_size=None)


def _dear(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Half the caps, which leaves long samples out; and shards on the host, which is slow."""
    data = config.data
    tokens, tiles, packs = data.max_tokens // 2, data.max_pack_tiles // 2, 2 * data.packs_per_step
    smaller = {"max_tokens": tokens, "max_pack_tiles": tiles, "packs_per_step": packs}
    settings = " ".join(f"data.{name}={value}" for name, value in smaller.items())
    yield settings, _group(config, "data", **smaller)
    if config.strategy.name in ("fsdp", "hsdp") and not config.strategy.cpu_offload:
        yield "strategy.cpu_offload=true", _group(config, "strategy", cpu_offload=True)


def _more_ranks(config: RunConfig, make: Make) -> Iterator[Remedy]:
    """A node where there was one rank; then twice the nodes, until it fits or a step has no more packs."""
    trainer, settings = config.trainer, ""
    if trainer.devices * trainer.num_nodes == 1 and config.lora.quantize is None:
        config = _group(_fully_sharded(config), "trainer", precision="32-true", devices=_NODE)
        settings, trainer = f"strategy=fsdp strategy.param_dtype=bfloat16 trainer.devices={_NODE} ", config.trainer
    if config.strategy.name != "fsdp":
        return
    nodes, before = trainer.num_nodes * (1 if settings else 2), make(config).memory.peak * (2 if settings else 1)
    while nodes * trainer.devices <= _MOST_RANKS and config.data.packs_per_step % (nodes * trainer.devices) == 0:
        forecast = make(_group(config, "trainer", num_nodes=nodes))
        if forecast.memory.peak >= before:
            return
        yield Remedy(f"{settings}trainer.num_nodes={nodes}", False, forecast)
        if forecast.fits:
            return
        before, nodes = forecast.memory.peak, 2 * nodes


def _group(config: RunConfig, group: str, **changes: object) -> RunConfig:
    """The stage with other settings of a group."""
    changed: dict[str, Any] = {group: replace(getattr(config, group), **changes)}
    return replace(config, **changed)


def _model(config: RunConfig, **changes: object) -> RunConfig:
    return _group(config, "model", **changes)
