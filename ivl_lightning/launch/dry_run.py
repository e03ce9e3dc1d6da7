"""`dry_run=true`: print what each stage would do, and do nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from hydra import compose
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import STAGES
from ivl_lightning.launch.command import configs_of, search_path
from ivl_lightning.launch.compose import ALIASES
from ivl_lightning.launch.outline import outline, trained
from ivl_lightning.launch.outline_inputs import NOT_GIVEN, Line
from ivl_lightning.launch.overrides import literal, parse

_LABEL_WIDTH = 14


@contextmanager
def traces_aside(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The arguments; those of a dry run send the folder and the log that Hydra makes elsewhere, to be thrown away."""
    if not _is_dry(arguments):
        yield list(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        last = max(place for place, argument in enumerate(arguments) if parse([argument])) + 1
        elsewhere = [f"hydra.{kind}.dir={literal(folder)}" for kind in ("run", "sweep")]
        # Hydra takes overrides side by side only, not behind its flags.
        yield [*arguments[:last], *elsewhere, *arguments[last:]]


def _is_dry(arguments: Sequence[str]) -> bool:
    values = {override.key_or_group: override.value() for override in parse(arguments)}
    return values.get("dry_run") is True


def stand_ins(composed: DictConfig) -> list[str]:
    """Overrides that let stages without `data.meta` be composed; whatever gives it, they yield to."""
    if not OmegaConf.is_missing(composed.data, "meta"):
        return []
    entries = OmegaConf.to_container(composed.recipe.stages, resolve=False)
    assert isinstance(entries, dict)
    own = [str(name) for name in composed.stages or ()]
    names = dict.fromkeys(ALIASES.get(name, name) for name in (*STAGES, *entries, *own))
    bare = [name for name in names if "meta" not in ((entries.get(name) or {}).get("data") or {})]
    return [f"++recipe.stages.{name}.data.meta={literal(NOT_GIVEN)}" for name in bare]


def print_dry_jobs(batch: Sequence[Sequence[str]], first: int, run_dir: str) -> None:
    """Print the chain of each job of a multirun.

    Args:
        batch: overrides of each job.
        first: number of the first.
        run_dir: of the multirun.

    Raises:
        ConfigError: a wrong setting.
    """
    for number, overrides in enumerate(batch, start=first):
        job_dir = f"{run_dir}/{number}"
        composed = compose("train", overrides=[*overrides, *search_path(), f"run_dir={literal(job_dir)}"])
        print_dry_run(configs_of([*overrides, *stand_ins(composed)], job_dir))


def print_dry_run(configs: Mapping[str, RunConfig], console: Console | None = None) -> None:
    """Print the chain.

    Args:
        configs: stage name -> its configuration, in order.
        console: where to; the terminal by default.
    """
    console = console or Console(highlight=False)
    console.print(grid(_header(next(iter(configs.values())))))
    before, shown, faults = None, dict[str, str](), dict[Line, list[str]]()
    for place, (name, config) in enumerate(configs.items(), start=1):
        lines = list(outline(name, config, before, shown))
        console.print()
        console.print(Text.assemble((f"{place}  {name}", "bold"), f" trains {trained(config)}"))
        console.print(grid(lines))
        for line in lines:
            if line.fault:
                faults.setdefault(replace(line, label=line.fault), []).append(name)
        before = name
    console.print()
    console.print(grid([*_left_out(configs), *_closing(faults)]))


def _header(config: RunConfig) -> Iterator[Line]:
    yield Line("dry run", "nothing is made, started or written")
    yield Line("recipe", config.recipe.name)
    yield Line("model", config.model.name)
    yield Line("source", config.recipe.source or "your own settings")
    yield Line("run folder", config.run_dir)


def _left_out(configs: Mapping[str, RunConfig]) -> Iterator[Line]:
    config = next(iter(configs.values()))
    for name in config.recipe.on_request:
        if name not in configs:
            yield Line("left out", f"{name}: it runs where stages=[...] or scaling.entry names it")
    if config.stages is not None:
        # Stages that are picked are all that runs.
        return
    for folder, overrides in config.recipe.sequels.items():
        if overrides:
            yield Line("afterwards", f"{config.run_dir}/{folder}: {' '.join(overrides)}")


def _closing(faults: Mapping[Line, list[str]]) -> Iterator[Line]:
    """What is missing or wrong, each thing once, with the stages that it keeps from running."""
    if not faults:
        yield Line("result", "nothing is missing; the same command without dry_run=true trains")
    for line, stages in faults.items():
        yield replace(line, text=f"{line.text} [{', '.join(stages)}]")


def grid(lines: Iterable[Line]) -> Table:
    """Lines as they are printed."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=_LABEL_WIDTH, style="cyan")
    grid.add_column(overflow="fold")
    for line in lines:
        word = f"{line.fault}: " if line.fault not in ("", line.label) else ""
        grid.add_row(Text(f"   {line.label}"), Text(f"{word}{line.text}", style="bold red" if line.fault else ""))
    return grid
