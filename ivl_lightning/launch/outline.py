"""What a stage would do, in a few lines for people; known from the settings and the files alone, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.config.lora import trained_parts
from ivl_lightning.config.schema import OptimConfig, Part, RunConfig
from ivl_lightning.launch.chain import stage_folder
from ivl_lightning.launch.finished import check_same_settings, deciding_settings, read_finished
from ivl_lightning.launch.meta_rows import MetaRows
from ivl_lightning.launch.outline_inputs import NOT_GIVEN, Line, about, data_lines, known_rows, start_lines

# The classes say the same, but importing them takes torch.
DEFAULT_TRAINABLE: dict[str, tuple[Part, ...]] = {
    "LanguageWarmup": ("llm",),
    "MLPWarmup": ("projector",),
    "ViTIncremental": ("vision", "projector"),
    "InstructionTuning": ("vision", "projector", "llm"),
    "MixedPreference": ("vision", "projector", "llm"),
}
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def outline(name: str, config: RunConfig, before: str | None, shown: dict[str, str]) -> Iterator[Line]:
    """The lines of a stage.

    Args:
        name: of the stage.
        config: its configuration.
        before: name of the stage before; None for the first.
        shown: see `data_lines`.
    """
    yield _state(name, config)
    yield from start_lines(config, before)
    yield from data_lines(config, shown)
    yield Line("length", _length(config, known_rows(config.data)))
    yield Line("each step", _step(config))
    yield Line("learning", _learning(config))
    yield Line("loss", _loss(config))
    yield devices_line(name, config)
    yield from _sources(name, config)


def trained(config: RunConfig) -> str:
    """The parts that a stage trains, and how."""
    default = DEFAULT_TRAINABLE.get(config.stage._target_.rpartition(".")[2], ())
    parts = trained_parts(config.stage.trainable, config.lora, default)
    return ", ".join(_part(part, config) for part in parts) or f"what {config.stage._target_} chooses"


def _part(part: Part, config: RunConfig) -> str:
    layers = config.stage.trainable_vision_layers if part == "vision" else None
    last = "" if layers is None else f" (last {_some(layers, 'layer')})"
    if part not in config.lora.parts:
        return f"{part}{last}"
    bits = ", its own weights in 4 bits" if part == "llm" and config.lora.quantize else ""
    return f"{part}{last} by LoRA (rank {config.lora.rank}{bits})"


def _state(name: str, config: RunConfig) -> Line:
    folder = stage_folder(config, name)
    finished = read_finished(folder)
    checkpoints = sorted((folder / "checkpoints").glob("step=*.ckpt"))
    try:
        if finished is not None:
            _check_same(finished.settings, config, folder, "finished")
            return Line("state", f"finished after {finished.steps:,} steps: it is skipped")
        if checkpoints:
            _check_same(_begun_with(folder), config, folder, "begun")
            return Line("state", f"begun: it goes on at step {int(checkpoints[-1].stem.partition('=')[2]):,}")
    except ConfigError as error:
        return Line("state", str(error), "wrong")
    return Line("state", "new")


def _check_same(then: Mapping[str, Any], config: RunConfig, folder: Path, state: str) -> None:
    if config.data.meta == NOT_GIVEN:
        # What is missing is said elsewhere, and would be the difference.
        return
    # The chain takes the template from the weights where the settings name none.
    template = config.model.template or then.get("model.template")
    config = replace(config, dry_run=False, model=replace(config.model, template=template))
    check_same_settings(then, config, folder, state)


def _begun_with(folder: Path) -> dict[str, Any]:
    return deciding_settings(load(RunConfig, yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))


def _length(config: RunConfig, rows: MetaRows | None) -> str:
    trainer, data = config.trainer, config.data
    steps, exact = steps_of(config, rows)
    epochs = _some(trainer.max_epochs, "epoch")
    if steps is None:
        return f"{epochs}; the steps are known once the data are measured (ivl-index)"
    tokens = f"at most {human(steps * data.packs_per_step * data.max_tokens)} tokens"
    if trainer.max_steps is not None:
        return f"{steps:,} steps, {tokens}"
    return f"{epochs}, {about(steps, exact=exact)} steps if no row is rejected, {tokens}"


def steps_of(config: RunConfig, rows: MetaRows | None) -> tuple[int | None, bool]:
    """Optimizer steps of the run, None where only measured data tell; and whether they follow from counted rows."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps, True
    batch = config.data.batch_pairs if config.stage.rows == "pairs" else config.data.batch_samples
    if batch is None or rows is None:
        return None, False
    held_back = config.data.val_rows / rows.rows if rows.rows else 0.0
    samples = round(rows.samples * (1 - min(held_back, 1.0)))
    return math.ceil(samples / batch) * config.trainer.max_epochs, rows.counted and not held_back


def human(number: float) -> str:
    """Three digits and a unit: 46.1 B."""
    # Rounded, 999,700 has four digits: it is 1 M.
    scale, unit = next(((scale, f" {unit}") for scale, unit in _UNITS if number >= 0.9995 * scale), (1, ""))
    return f"{number / scale:.3g}{unit}"


def _step(config: RunConfig) -> str:
    data = config.data
    packs = _some(data.packs_per_step, "pack")
    caps = f"of at most {data.max_tokens:,} tokens and {data.max_pack_tiles:,} tiles"
    if config.stage.rows == "pairs":
        return f"{data.batch_pairs:,} pairs of answers in {packs} {caps}"
    if data.batch_samples is not None:
        return f"{data.batch_samples:,} conversations in {packs} {caps}"
    return f"{packs} {caps}, as many conversations as fit"


def _learning(config: RunConfig) -> str:
    optim = config.optim
    floor = f"cosine to {number(optim.min_lr_ratio * optim.lr)}" if optim.schedule == "cosine" else "then constant"
    rate = f"lr {number(optim.lr)}{_by_part(optim.lr_by_part)}"
    decay = f"weight decay {number(optim.weight_decay)}{_by_part(optim.weight_decay_by_part)}"
    layers = f", lr x {optim.vision_layer_decay:g} a vision layer down" if optim.vision_layer_decay != 1.0 else ""
    drop = f", drop path {config.stage.drop_path_rate:g}" if config.stage.drop_path_rate else ""
    return f"{rate}{layers}, {_warmup(optim, config.trainer.max_steps)}, {floor}; {decay}{drop}"


def _by_part(values: Mapping[Part, float | None]) -> str:
    own = [f"{part} {number(value)}" for part, value in values.items() if value is not None]
    return f" ({', '.join(own)})" if own else ""


def _warmup(optim: OptimConfig, max_steps: int | None) -> str:
    if optim.warmup_steps is not None:
        return f"warm-up {optim.warmup_steps:,} steps"
    steps = "" if max_steps is None else f" ({math.ceil(optim.warmup_ratio * max_steps):,} steps)"
    return f"warm-up {optim.warmup_ratio * 100:g}%{steps}"


def number(value: float) -> str:
    """As one writes a learning rate or a decay: 4e-5, 0.05."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _loss(config: RunConfig) -> str:
    if config.stage.rows != "pairs":
        return f"next token, {config.loss.reduction} averaging"
    parts = [f"{part['weight']:g} {name}" for name, part in config.preference.parts.items() if part is not None]
    return f"{' + '.join(parts)}, beta {config.preference.beta:g}"


def devices_line(name: str, config: RunConfig) -> Line:
    """Nodes, devices, strategy and accumulation of a stage."""
    trainer, packs = config.trainer, config.data.packs_per_step
    ranks = trainer.devices * trainer.num_nodes
    layout = f"{_some(trainer.num_nodes, 'node')} x {_some(trainer.devices, 'device')} ({config.strategy.name})"
    published = f"; published on {config.recipe.gpus[name]:,} GPUs" if name in config.recipe.gpus else ""
    if ranks < 1 or packs % ranks:
        text = f"{layout}: data.packs_per_step={packs} cannot be dealt to {ranks} ranks evenly: make it a multiple"
        return Line("devices", text, "wrong")
    return Line("devices", f"{layout}, accumulation {packs // ranks:,}{published}")


def _some(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def _sources(name: str, config: RunConfig) -> Iterator[Line]:
    """Where a stage's numbers come from, as far as it is not where the recipe's come from."""
    if name in config.recipe.sources:
        yield Line("source", config.recipe.sources[name])
    if chosen := config.recipe.chosen.get(name):
        yield Line("chosen", f"{', '.join(chosen)} (not published; as in the nearest member of the family)")
