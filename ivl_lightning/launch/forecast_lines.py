"""A forecast told to people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.text import Text

from ivl_lightning.config.plan import PlanConfig
from ivl_lightning.launch.dry_run import grid
from ivl_lightning.launch.forecast import StageForecast
from ivl_lightning.launch.outline import devices_line, human, trained
from ivl_lightning.launch.outline_inputs import Line, about
from ivl_lightning.planning.forecast import Forecast
from ivl_lightning.planning.hardware import GB
from ivl_lightning.planning.layout import FLOAT32
from ivl_lightning.planning.remedies import Remedy

_LEAST_SHOWN = 0.005 * GB
_HOUR = 3600
_FLOP_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"))


def print_forecast(stages: Mapping[str, StageForecast], plan: PlanConfig, console: Console | None = None) -> None:
    """Print the forecast of a run.

    Args:
        stages: stage name -> its forecast, in order.
        plan: what was taken for granted.
        console: where to; the terminal by default.
    """
    console = console or Console(highlight=False)
    first = next(iter(stages.values()))
    console.print(grid(_header(first, plan)))
    for place, (name, stage) in enumerate(stages.items(), start=1):
        console.print()
        console.print(Text.assemble((f"{place}  {name}", "bold"), f" trains {trained(stage.config)}"))
        console.print(grid(_lines(name, stage, plan)))
    console.print()
    console.print(grid(_closing(stages)))


def _header(stage: StageForecast, plan: PlanConfig) -> Iterator[Line]:
    config = stage.config
    yield Line("forecast", f"recipe {config.recipe.name}, model {config.model.name}")
    yield Line(
        "taken", f"{stage.forecast.gpu.title} at {plan.mfu:.0%} of its peak, {plan.network_gb:g} GB/s between nodes"
    )


def _lines(name: str, stage: StageForecast, plan: PlanConfig) -> Iterator[Line]:
    forecast = stage.forecast
    yield devices_line(name, stage.config)
    if stage.config.trainer.accelerator == "cpu":
        yield Line("note", "trainer.accelerator=cpu: told as if it ran on the GPU")
    for note in stage.notes:
        yield Line("note", note)
    yield Line("parameters", _parameters(forecast))
    yield from _memory(forecast)
    yield from _changes(stage.remedies)
    yield from _work(forecast)
    yield from _time(stage)
    yield from _files(stage, plan)


def _parameters(forecast: Forecast) -> str:
    network = forecast.network
    parts = [
        f"{part} {human(count.total)}" + (f" ({human(count.trainable)} train)" if count.trainable else " (frozen)")
        for part, count in network.parts.items()
    ]
    return f"{human(network.whole.total)}, {human(network.whole.trainable)} train: {', '.join(parts)}"


def _memory(forecast: Forecast) -> Iterator[Line]:
    memory, room = forecast.memory, forecast.gpu.memory
    verdict = "fits" if forecast.fits else "does not fit"
    text = f"{memory.peak / GB:,.1f} of {room / GB:,.0f} GB a GPU, highest at {memory.peak_moment}: {verdict}"
    yield Line("memory", text, "" if forecast.fits else "wrong")
    shown = sorted(memory.parts.items(), key=lambda part: -part[1])
    yield Line("", ", ".join(f"{part} {size / GB:,.2f}" for part, size in shown if size >= _LEAST_SHOWN))
    if memory.host:
        yield Line("", f"on the host, for each GPU: {memory.host / GB:,.1f} GB")


def _changes(found: list[Remedy]) -> Iterator[Line]:
    """Each change, what it gives, and which is the first that fits."""
    fitting = next((remedy for remedy in found if remedy.forecast.fits), None)
    for place, remedy in enumerate(found):
        forecast = remedy.forecast
        word = "" if place == 0 else "and " if remedy.added else "on top of that, by itself: "
        gives = f"{forecast.memory.peak / GB:,.1f} GB, {_seconds(forecast.pace.step)} s a step"
        verdict = ": the first that fits" if remedy is fitting else ": fits" if forecast.fits else ""
        yield Line("change" if place == 0 else "", f"{word}{remedy.settings}: {gives}{verdict}")
    if found and fitting is None:
        yield Line("", "none of them fits: combine them, or take more or larger GPUs")


def _work(forecast: Forecast) -> Iterator[Line]:
    work, load = forecast.work, forecast.load
    yield Line(
        "each step",
        f"{'' if load.source == 'index' else 'at most '}{human(load.tokens)} tokens, {human(load.tiles)} tiles"
        + (f", {human(load.samples)} samples" if load.samples else "")
        + (f"; ranks wait {load.idle:.1%} for the slowest" if load.source == "index" else ""),
    )
    parts = {
        "forward": work.forward,
        "backward": work.backward,
        "again in backward": work.recomputed,
        "reference": work.reference,
    }
    told = ", ".join(f"{part} {_flops(number)}" for part, number in parts.items() if number)
    yield Line("work", f"{_flops(work.executed)} FLOP a step: {told}")


def _flops(number: float) -> str:
    """Four digits and the unit of FLOP."""
    scale, unit = next(((scale, unit) for scale, unit in _FLOP_UNITS if number >= scale), _FLOP_UNITS[-1])
    return f"{number / scale:,.4g} {unit}"


def _time(stage: StageForecast) -> Iterator[Line]:
    forecast, pace = stage.forecast, stage.forecast.pace
    bound = "computing" if pace.compute >= pace.communication else "communication"
    sent = f"communication {_seconds(pace.communication)} ({pace.sent / GB:,.1f} GB to a rank)"
    parts = f"computing {_seconds(pace.compute)}, {sent}, optimizer {_seconds(pace.update)}"
    yield Line("time", f"{_seconds(pace.step)} s a step, bound by {bound}: {parts}")
    if forecast.layout.compute == FLOAT32:
        slow = f"{forecast.gpu.bfloat16 / forecast.gpu.float32:,.0f} times"
        yield Line("", f"it computes in float32, whose peak is {slow} lower than that of bfloat16")
    rate = "" if forecast.load.samples is None else f"{forecast.load.samples / pace.step:,.1f} samples/s, "
    per_rank = forecast.load.tokens / pace.step / forecast.layout.ranks
    yield Line("", f"{rate}{human(per_rank)} tokens/s a GPU, {forecast.mfu:.0%} MFU of useful work")
    if stage.steps is None:
        yield Line("total", "the steps are known once the data are measured (ivl-index)")
        return
    seconds = stage.steps * pace.step
    steps = f"{about(stage.steps, exact=stage.exact)} steps"
    yield Line("total", f"{steps}, {duration(seconds)}, {seconds * forecast.layout.ranks / _HOUR:,.0f} GPU hours")


def _seconds(number: float) -> str:
    """Three digits at most: 214, 3.35, 0.0012."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 1e-4 else "0"


def duration(seconds: float) -> str:
    """For people: 45 min, 7.5 h, 3.2 days."""
    if seconds < _HOUR:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds / _HOUR:,.1f} h" if seconds < 48 * _HOUR else f"{seconds / _HOUR / 24:,.1f} days"


def _files(stage: StageForecast, plan: PlanConfig) -> Iterator[Line]:
    forecast, trainer = stage.forecast, stage.config.trainer
    size = forecast.checkpoint / GB
    kept = "" if trainer.checkpoint_every_n_steps is None else f", {trainer.keep_checkpoints} are kept"
    yield Line(
        "files",
        f"checkpoint {size:,.2f} GB, {size / plan.storage_gb:,.1f} s at {plan.storage_gb:g} GB/s{kept}; "
        f"final weights {forecast.weights / GB:,.2f} GB",
    )


def _closing(stages: Mapping[str, StageForecast]) -> Iterator[Line]:
    too_large = [name for name, stage in stages.items() if not stage.forecast.fits]
    if too_large:
        yield Line("result", f"{', '.join(too_large)}: does not fit", "wrong")
    known = [stage.steps * stage.forecast.pace.step for stage in stages.values() if stage.steps is not None]
    if len(known) == len(stages):
        yield Line("all stages", duration(sum(known)))
    yield Line("", "a forecast, never measured on a GPU: docs/scale.md has every assumption")
