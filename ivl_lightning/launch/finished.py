"""When a stage counts as finished: done.json, with hashes of its configuration and of its input weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import DONE_NAME
from ivl_lightning.whole_files import write_whole

# Settings that say how a stage ran and not what it learned.
_VOLATILE: tuple[str, ...] = (
    "run_dir",
    "stages",
    "stage_data",
    "recipe",
    "logger",
    "launcher",
    "objective",
    "callbacks",
    "strategy",
    "eval",
    "init_from",
    # What it holds counts: by the hash of the input weights.
    "scaling.donor",
    "dry_run",
    "replay",
    # They follow from the stage's class and the function.
    "stage.rows",
    "data.prepare.needs_weights",
    "data.cache_dir",
    # A check of the data, which count by what the plan makes of them.
    "data.expected_rows",
    "data.index_workers",
    "data.num_workers",
    "data.retries",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.progress_bar",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_n_steps",
    "trainer.keep_checkpoints",
    "trainer.async_checkpoints",
    "trainer.threads",
)


# Callbacks that change what is learned: averages take the place of the last weights.
_DECIDING_CALLBACKS = ("callbacks.ema",)

# Settings that a chain shares and only the one or the other kind of stage reads.
_OF_PREFERENCE = ("preference", "data.batch_pairs", "data.augmentation_seed", "data.generation_meta")
_OF_SUPERVISED = ("loss", "data.batch_samples")


@dataclass(frozen=True, slots=True)
class Finished:
    """What done.json says.

    Attributes:
        stage: its name.
        settings: the configuration's settings that decide what is learned, by dotted key.
        input_weights: hash of the weights it started from, or `random`.
        output_weights: hash of the weights it wrote.
        trained: parts that trained.
        steps: optimizer steps.
        loss_first, loss_last: training loss of the first and of the last logged step.
        scores: last validation metrics.
        seconds: wall time.
        rejected: rows left out, by reason.
        averaged: of what the written weights are an average; None for those of the last step.
    """

    stage: str
    settings: dict[str, Any]
    input_weights: str
    output_weights: str
    trained: list[str]
    steps: int
    loss_first: float
    loss_last: float
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    rejected: dict[str, int] = field(default_factory=dict)
    averaged: str | None = None

    def write(self, folder: Path) -> None:
        """Write done.json, whole or not at all."""
        write_whole(folder / DONE_NAME, json.dumps(asdict(self), indent=2, ensure_ascii=False))


def read_finished(folder: Path) -> Finished | None:
    """What a stage folder's done.json says; None where the stage is not finished."""
    path = folder / DONE_NAME
    if not path.is_file():
        return None
    return Finished(**json.loads(path.read_text(encoding="utf-8")))


def finished_stage(name: str, config: RunConfig) -> Finished | None:
    """What the done.json of a stage says; None where it is not finished. The weights it starts from are not looked at.

    Raises:
        ConfigError: it was finished with other settings.
    """
    folder = Path(config.run_dir) / name
    finished = read_finished(folder)
    if finished is None:
        return None
    # Where it is not given it is that of the weights.
    template = config.model.template or finished.settings["model.template"]
    config = replace(config, model=replace(config.model, template=template))
    check_same_settings(finished.settings, config, folder, "finished")
    return finished


def check_same(finished: Finished, config: RunConfig, input_weights: str, folder: Path) -> None:
    """A finished stage is skipped only if this command would train the same.

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    check_same_settings(finished.settings, config, folder, "finished")
    if finished.input_weights != input_weights:
        raise ConfigError(f"{folder} was finished from other input weights than there are now. {_remedy(folder)}")


def check_same_settings(then: Mapping[str, Any], config: RunConfig, folder: Path, state: str) -> None:
    """The settings a stage was begun or finished with must be this command's.

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    now = deciding_settings(config)
    for key in [*now, *(key for key in then if key not in now)]:
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} was {state} with {key}={then.get(key)!r}, this command says {now.get(key)!r}. "
                f"{_remedy(folder)}"
            )


def _remedy(folder: Path) -> str:
    return f"Use another run_dir, or delete {folder} to train the stage again"


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """Settings by dotted key, without those that only say how a stage runs or that it does not read; JSON values."""
    others = _OF_SUPERVISED if config.stage.rows == "pairs" else _OF_PREFERENCE
    if not config.lora.parts:
        # Without adapters none of it is read.
        others = (*others, "lora")
    if config.scaling.donor is None:
        others = (*others, "scaling")
    plain = json.loads(json.dumps(asdict(config)))
    return {
        key: value
        for key, value in _dotted(plain)
        if _within(key, _DECIDING_CALLBACKS) or not _within(key, (*_VOLATILE, *others))
    }


def _within(key: str, groups: Iterable[str]) -> bool:
    """Whether a dotted key is one of these settings, or below one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _dotted(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def weights_hash(place: Path) -> str:
    """Hash of the weight files of a folder, names and contents; of an adapter those of its base too.

    Args:
        place: the folder, or a single file of weights.

    Raises:
        ConfigError: the folder holds none.
        CheckpointError: the base of an adapter cannot be found.
    """
    digest = hashlib.sha256()
    for file in _weight_files(place):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _weight_files(place: Path) -> list[Path]:
    # Imported late: what decides whether a stage is finished must not wait for torch.
    from ivl_lightning.checkpoints.adapters import adapter_base, is_adapter

    if place.is_file():
        return [place]
    # As `open_folder` chooses them.
    files = sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin"))
    if not files:
        raise ConfigError(f"{place} holds no weights: looked for *.safetensors and *.bin")
    return [*files, *_weight_files(adapter_base(place))] if is_adapter(place) else files
