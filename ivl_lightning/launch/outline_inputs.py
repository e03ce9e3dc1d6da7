"""What a stage needs, for a dry run: weights and data, and what of them is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ivl_lightning.checkpoints.run_folders import tower_folder, weights_folder
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import DataConfig, RunConfig
from ivl_lightning.constants import PREFERENCE_STAGE
from ivl_lightning.data.annotations import MetaError
from ivl_lightning.launch.meta_rows import MetaRows, read_rows
from ivl_lightning.launch.start import HOW_TO_START, how_to_give_tower

NOT_GIVEN = "(not given)"
"""Stands for a `data.meta` that nobody gave, so that the rest of the settings can be shown."""

_MOST_LISTED = 10


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a stage's outline.

    Attributes:
        label: what it is about; empty where it goes on with the line before.
        text: what there is to say.
        fault: `missing` or `wrong` where the stage cannot run like this; else empty.
    """

    label: str
    text: str
    fault: Literal["", "missing", "wrong"] = ""


def start_lines(config: RunConfig, before: str | None) -> Iterator[Line]:
    """Where the weights come from.

    Args:
        config: of the stage.
        before: name of the stage before; None for the first.
    """
    if before is not None:
        yield Line("starts from", f"weights of {before}")
    elif config.init_from is not None:
        yield _folder_line("starts from", "init_from", config.init_from)
    else:
        yield from _first_lines(config)
    if config.scaling.donor is not None:
        also = "; its projector too where it fits" if config.scaling.projector == "match" else ""
        yield _folder_line("tower from", "scaling.donor", config.scaling.donor, also)


def _folder_line(label: str, setting: str, source: str, also: str = "") -> Line:
    """The folder of weights that a setting stands for; of a run those of one of its stages."""
    find = tower_folder if setting == "scaling.donor" else weights_folder
    try:
        return Line(label, f"{find(source, setting=setting)} ({setting}{also})")
    except ConfigError as error:
        return Line(label, str(error), "wrong")


def _first_lines(config: RunConfig) -> Iterator[Line]:
    model = config.model
    parts = {
        "model.path": model.path,
        "model.vision_path": model.vision_path,
        "model.projector_path": model.projector_path,
        "model.language_model_path": model.language_model_path,
    }
    given = {setting: path for setting, path in parts.items() if path is not None}
    if not (model.path or model.language_model_path or model.random_weights):
        yield Line("starts from", f"weights to start from: {HOW_TO_START}", "missing")
    elif not given:
        yield Line("starts from", "random weights")
    for setting, path in given.items():
        found = Path(path).exists()
        yield Line("starts from", f"{path} ({setting})", "" if found else "missing")
    yield from _tower_lines(config)


def _tower_lines(config: RunConfig) -> Iterator[Line]:
    """A language model alone, or a recipe that takes another's tower, wants a vision tower from somewhere."""
    model, known = config.model, config.recipe.donor
    if model.path or model.vision_path or config.scaling.donor:
        return
    if model.language_model_path or (known and not model.random_weights):
        yield Line("tower from", f"a vision tower: {how_to_give_tower(known)}", "missing")
    elif known:
        yield Line("tower from", f"random weights; for a trained one {how_to_give_tower(known)}")


def data_lines(config: RunConfig, shown: dict[str, str]) -> Iterator[Line]:
    """Training and validation data.

    Args:
        config: of the stage.
        shown: meta file -> stage under which its datasets are listed; this stage is added.
    """
    data, name = config.data, config.stage.name
    rows = known_rows(data)
    yield _meta_line("data", data.meta, config)
    if rows is not None and data.expected_rows is not None:
        yield from _unexpected_lines(rows, data.expected_rows)
    if rows is not None and shown.setdefault(data.meta, name) != name:
        yield Line("", f"the datasets listed under {shown[data.meta]}")
    elif rows is not None:
        yield from _dataset_lines(rows)
    if data.val_meta is not None:
        yield _meta_line("validation", data.val_meta, config)
    else:
        yield Line("validation", f"{data.val_rows:,} rows of the data, held back" if data.val_rows else "none")
    if config.stage.rows == "pairs" and data.generation_meta is not None:
        yield _meta_line("questions", data.generation_meta, config)


def known_rows(data: DataConfig) -> MetaRows | None:
    """The datasets of the training data; None where there is no such file yet, or one that cannot be used."""
    try:
        return read_rows(data.meta) if Path(data.meta).is_file() else None
    except MetaError:
        return None


def _meta_line(label: str, meta: str, config: RunConfig) -> Line:
    if meta == NOT_GIVEN:
        return Line(label, _how_to_give(config), "missing")
    if not Path(meta).is_file():
        return _absent(label, meta, config)
    try:
        rows = read_rows(meta)
    except MetaError as error:
        return Line(label, str(error), "wrong")
    sets = f"{len(rows.datasets)} dataset" + "s" * (len(rows.datasets) != 1)
    return Line(label, f"{meta}: {sets}, {about(rows.rows, exact=rows.counted)} rows")


def _unexpected_lines(rows: MetaRows, expected: Mapping[str, int]) -> Iterator[Line]:
    """What is not as `data.expected_rows` says, as far as it was counted."""
    found = {dataset.name: dataset for dataset in rows.datasets}
    for name in sorted(found.keys() ^ expected.keys()):
        fault = "is not expected" if name in found else "is expected, and not there"
        yield Line("", f"dataset {name} {fault} (data.expected_rows)", "wrong")
    for name in sorted(found.keys() & expected.keys()):
        if found[name].counted and found[name].rows != expected[name]:
            text = f"dataset {name} has {found[name].rows:,} rows, {expected[name]:,} expected (data.expected_rows)"
            yield Line("", text, "wrong")


def _absent(label: str, meta: str, config: RunConfig) -> Line:
    prepare = config.data.prepare
    if prepare is None or not Path(meta).absolute().is_relative_to(Path(prepare.folder).absolute()):
        return Line(label, f"file {meta}", "missing")
    return Line(label, f"{meta}, made by {prepare._target_.removeprefix('ivl_lightning.')}")


def _how_to_give(config: RunConfig) -> str:
    if config.stage.rows == "pairs":
        return f"stage_data.{PREFERENCE_STAGE}=FILE, a meta.json of pairs"
    expected = config.data.expected_rows
    return "data.meta=FILE, an official meta.json" + (f" of {', '.join(expected)}" if expected else "")


def _dataset_lines(rows: MetaRows) -> Iterator[Line]:
    listed = rows.datasets[:_MOST_LISTED]
    counts = [about(dataset.rows, exact=dataset.counted) for dataset in listed]
    wide, long = max(len(dataset.name) for dataset in listed), max(map(len, counts))
    for dataset, count in zip(listed, counts, strict=True):
        yield Line("", f"{dataset.name:{wide}}  {count:>{long}} rows x {dataset.repeat_time:g}")
    if len(rows.datasets) > len(listed):
        yield Line("", f"and {len(rows.datasets) - len(listed)} more")


def about(number: int, *, exact: bool) -> str:
    """A number for people."""
    return f"{number:,}" if exact else f"about {number:,}"
