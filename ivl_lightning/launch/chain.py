"""The chain of stages: each in a process of its own, finished ones skipped, a failure stops it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from rich import print as rich_print

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import PrepareConfig, RunConfig
from ivl_lightning.constants import DONE_NAME, PREEMPTED_EXIT_CODE, WEIGHTS_FOLDER
from ivl_lightning.launch.crew import Crew
from ivl_lightning.launch.finished import (
    Finished,
    check_same,
    check_same_settings,
    deciding_settings,
    read_finished,
)
from ivl_lightning.launch.start import first_weights


class StageFailedError(RuntimeError):
    """A stage's process ended with an error, which it has printed itself."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"stage {name} failed with exit code {code}; later stages were not started")
        self.code = code


class StageStoppedError(RuntimeError):
    """A stage was asked to stop and has; no fault."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stage {name} stopped on request after a checkpoint; the same command goes on")


def run_chain(configs: Mapping[str, RunConfig], crew: Crew | None = None) -> list[Finished]:
    """Run the stages in order, each from the weights of the one before.

    Args:
        configs: stage name -> its configuration, all composed and checked beforehand.
        crew: processes that run each stage; None: this one alone.

    Returns:
        What each stage's done.json says.

    Raises:
        ConfigError: a finished stage was trained with other settings.
        StageFailedError: a stage's process failed, on whichever rank.
        StageStoppedError: a stage stopped on request.
    """
    crew = crew or Crew()
    results = []
    source = first_weights(configs)
    for name, config in configs.items():
        if source is not None:
            config = replace(config, init_from=source)
        results.append(_run_or_skip(name, config, crew))
        source = str(stage_folder(config, name) / WEIGHTS_FOLDER)
    return results


def stage_folder(config: RunConfig, name: str) -> Path:
    """RUN/NAME."""
    return Path(config.run_dir) / name


def _run_or_skip(name: str, config: RunConfig, crew: Crew) -> Finished:
    # Imported late: composing and checking a chain must not wait for torch.
    from ivl_lightning.launch.network import with_template
    from ivl_lightning.launch.run_stage import input_hash, read_config, write_config
    from ivl_lightning.launch.trainer import newest_checkpoint

    config = replace(config, model=with_template(config.model, config.init_from))
    folder = stage_folder(config, name)
    finished = read_finished(folder)
    if finished is not None:
        check_same(finished, config, input_hash(config), folder)
        rich_print(f"[bold]{name}[/bold] is finished, skipped")
        return finished
    if newest_checkpoint(folder) is not None:
        check_same_settings(deciding_settings(read_config(folder)), config, folder, "begun")
    if config.data.prepare is not None:
        prepare(config.data.prepare, config.init_from or config.model.path)
    write_config(config, folder)
    rich_print(f"[bold]{name}[/bold] -> {folder}")
    code = crew.run(folder)
    if code == PREEMPTED_EXIT_CODE:
        raise StageStoppedError(name)
    if code:
        raise StageFailedError(name, code)
    finished = read_finished(folder)
    assert finished is not None, f"{folder} has no {DONE_NAME} after exit code 0"
    return finished


def prepare(config: PrepareConfig, weights: str | None = None) -> None:
    """Make the data a stage needs; the function itself skips what is there.

    Args:
        config: the function and its arguments.
        weights: folder that the stage starts from.

    Raises:
        ConfigError: the function needs weights and there are none.
    """
    function: Any = get_method(config._target_)
    if not config.needs_weights:
        function(config.folder, **config.options)
        return
    if weights is None:
        raise ConfigError(f"{config._target_} needs weights to make its data: give init_from=RUN or model.path=FOLDER")
    function(config.folder, weights=weights, **config.options)
