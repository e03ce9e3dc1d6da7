"""Which weights a path stands for: a run, a stage of it, or a plain folder."""

from __future__ import annotations

from pathlib import Path

from ivl_lightning.config.check import ConfigError
from ivl_lightning.constants import DONE_NAME, TOWER_STAGE, WEIGHTS_FOLDER


def weights_folder(source: str, *, setting: str = "init_from") -> Path:
    """The weights a run, a stage of it, or a plain folder holds; of a run those of the stage that finished last.

    Args:
        source: the path.
        setting: that gave it, for messages.

    Raises:
        ConfigError: there are none.
    """
    folder = _existing(source, setting)
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    if (folder / WEIGHTS_FOLDER / "config.json").is_file():
        return folder / WEIGHTS_FOLDER
    finished = _finished(folder)
    if not finished:
        raise ConfigError(f"{setting}={source}: neither a folder of weights nor a run with a finished stage")
    return finished[-1] / WEIGHTS_FOLDER


def tower_folder(source: str, *, setting: str = "scaling.donor") -> Path:
    """The weights whose vision tower is carried on; of a run those of stage 1.5, if it is finished.

    The published scripts carry the tower that stage 1.5 has trained beside a frozen language model, and not the one
    that stage 2 has tuned further.

    Raises:
        ConfigError: there are none.
    """
    trained = _existing(source, setting) / TOWER_STAGE
    return trained / WEIGHTS_FOLDER if (trained / DONE_NAME).is_file() else weights_folder(source, setting=setting)


def _existing(source: str, setting: str) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        fault = "this is a file: give its folder" if folder.exists() else "there is no such folder"
        raise ConfigError(f"{setting}={source}: {fault}")
    return folder


def _finished(run: Path) -> list[Path]:
    """Folders of a run's finished stages, in the order in which they finished."""
    found = sorted(run.glob(f"*/{DONE_NAME}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in found]
