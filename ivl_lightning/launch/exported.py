"""What `ivl-export` reads: the weights of a stage, or a checkpoint of one that is still under way."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import InternVLConfig

from ivl_lightning.checkpoints.adapters import Merged
from ivl_lightning.checkpoints.lightning_files import open_lightning
from ivl_lightning.checkpoints.run_folders import weights_folder
from ivl_lightning.checkpoints.source import CheckpointError, Combined, TensorSource, renamed
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.convert import ExportConfig
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import CHECKPOINTS_FOLDER, WEIGHTS_FOLDER
from ivl_lightning.launch.network import tokenizer_of
from ivl_lightning.launch.run_stage import CONFIG_NAME, initial_checkpoint, read_config
from ivl_lightning.launch.trainer import newest_checkpoint
from ivl_lightning.models.checkpoint import Checkpoint, open_checkpoint
from ivl_lightning.models.lora import lora_scale
from ivl_lightning.stages.base import NETWORK_CONFIG

_NETWORK = "root.internvl."


def open_run(config: ExportConfig) -> Checkpoint:
    """The weights to be exported.

    Raises:
        ConfigError: no such run, stage or checkpoint.
        CheckpointError: weights that are incomplete or damaged.
    """
    folder = stage_folder(config)
    if config.checkpoint == WEIGHTS_FOLDER:
        return open_checkpoint(folder / WEIGHTS_FOLDER)
    run = read_config(folder)
    found = _checkpoint_path(folder, config.checkpoint)
    return _open_training(found, run)


def stage_folder(config: ExportConfig) -> Path:
    """The folder of the stage that is exported.

    Raises:
        ConfigError: there is none.
    """
    run = Path(config.run)
    if not run.is_dir():
        raise ConfigError(f"run={run}: there is no such folder")
    if config.stage is not None:
        return _known_stage(run / config.stage, f"run={run} stage={config.stage}")
    if (run / CONFIG_NAME).is_file():
        return run
    if config.checkpoint == WEIGHTS_FOLDER:
        return weights_folder(config.run).parent
    begun = sorted(run.glob(f"*/{CHECKPOINTS_FOLDER}"), key=lambda path: path.stat().st_mtime)
    if not begun:
        raise ConfigError(f"run={run}: no stage of it has a checkpoint")
    return begun[-1].parent


def _known_stage(folder: Path, named: str) -> Path:
    if not (folder / CONFIG_NAME).is_file():
        begun = sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG_NAME}"))
        raise ConfigError(f"{named}: the run has no such stage, it has {', '.join(begun) or 'none'}")
    return folder


def _checkpoint_path(folder: Path, name: str) -> Path:
    if name == "newest":
        newest = newest_checkpoint(folder)
        if newest is None:
            raise ConfigError(f"checkpoint=newest: {folder} has no checkpoint yet")
        return newest
    found = folder / CHECKPOINTS_FOLDER / name
    if not found.exists():
        there = sorted(path.name for path in (folder / CHECKPOINTS_FOLDER).glob("*.ckpt"))
        raise ConfigError(
            f"checkpoint={name}: {folder} has {', '.join(there) or 'none'}, or give `newest` or `weights`"
        )
    return found


def _open_training(path: Path, run: RunConfig) -> Checkpoint:
    """A trainer's checkpoint; with adapters, merged into the weights that the stage started from."""
    state, rest = open_lightning(path)
    values = rest.get(NETWORK_CONFIG)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not say of which network it is: a version before exports wrote it")
    tensors: TensorSource = renamed(
        state, lambda name: name.removeprefix(_NETWORK) if name.startswith(_NETWORK) else None
    )
    if run.lora.parts:
        tensors = Merged(_with_base(tensors, run), lora_scale(run.lora))
    tokenizer = partial(tokenizer_of, run.model, run.init_from)
    return Checkpoint(path, InternVLConfig.from_dict(values), tensors, tokenizer=tokenizer)


def _with_base(tensors: TensorSource, run: RunConfig) -> TensorSource:
    """Checkpoints leave out what was frozen, but for those that shards hold whole."""
    if any(".base_layer." in name for name in tensors.names()):
        return tensors
    base = initial_checkpoint(run)
    if base is None:
        raise CheckpointError(
            "the adapters of this checkpoint were trained on random weights, which are saved nowhere: export the "
            "finished stage (checkpoint=weights)"
        )
    return Combined([base.tensors, tensors])
