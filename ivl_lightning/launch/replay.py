"""`replay=STEP`: which stage a step is run again of, and the folder that its process reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import DONE_NAME
from ivl_lightning.launch.finished import check_same_settings, deciding_settings

REPLAY_FOLDER = "replay"


def write_replay(configs: Mapping[str, RunConfig]) -> Path:
    """Write the configuration of the replay that the chain's settings ask for; returns its folder, which a stage's
    process takes.

    It is the configuration of the stage as it ran, but for what this command says of devices, workers and the like.

    Args:
        configs: of the chain, with `replay`.

    Raises:
        ConfigError: the stage is not clear, has not begun, ran with other settings or does not get that far.
    """
    # Imported late: composing and checking a chain must not wait for torch.
    from ivl_lightning.launch.network import with_template
    from ivl_lightning.launch.run_stage import read_config, write_config

    config = configs[_stage_of(configs)]
    step = config.replay
    assert step is not None, "a replay was asked for"
    stage_folder = Path(config.run_dir) / config.stage.name
    begun = read_config(stage_folder)
    config = replace(config, init_from=begun.init_from, model=with_template(config.model, begun.init_from))
    check_same_settings(deciding_settings(begun), config, stage_folder, "begun")
    if config.trainer.max_steps is not None and step >= config.trainer.max_steps:
        raise ConfigError(
            f"replay={step}: there are trainer.max_steps={config.trainer.max_steps} steps, 0 to "
            f"{config.trainer.max_steps - 1}; STEP is the number of finished steps before the one that is meant"
        )
    folder = stage_folder / REPLAY_FOLDER / f"step={step:08d}"
    write_config(config, folder)
    return folder


def stage_folder_of(replay_folder: Path) -> Path:
    """The stage of which a folder of `write_replay` runs a step again."""
    return replay_folder.parents[1]


def _stage_of(configs: Mapping[str, RunConfig]) -> str:
    """The one stage of the command; else the one that had to stop at this step, else the one that is not finished."""
    begun = {name: config for name, config in configs.items() if (_folder(config) / "config.yaml").is_file()}
    if not begun:
        first = next(iter(configs.values()))
        raise ConfigError(f"replay={first.replay}: no stage of {first.run_dir} has begun")
    stopped = [name for name, config in begun.items() if _stopped_at(config)]
    unfinished = [name for name, config in begun.items() if not (_folder(config) / DONE_NAME).is_file()]
    for found in (list(begun) if len(configs) == 1 else [], stopped, unfinished):
        if len(found) == 1:
            return found[0]
    raise ConfigError(f"replay: which stage is meant, {' or '.join(begun)}? Add stages=[NAME]")


def _folder(config: RunConfig) -> Path:
    return Path(config.run_dir) / config.stage.name


def _stopped_at(config: RunConfig) -> bool:
    from ivl_lightning.stages.step_record import bad_step_file

    assert config.replay is not None, "a replay was asked for"
    return bad_step_file(_folder(config), config.replay).is_file()
