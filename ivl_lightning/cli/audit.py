"""`ivl-audit data.meta=FILE output=FOLDER`: look at data before training. One process, no accelerator."""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ivl_lightning.config.audit import AuditConfig
from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.launch.compose import values_without_stages
from ivl_lightning.launch.overrides import forced
from ivl_lightning.reporting.audit.places import ERROR_NAME, checked_places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ivl_lightning.reporting.audit.audit import Audit, Geometry

OVER_LIMIT, MISTAKE, CRASH, INTERRUPTED = 1, 2, 70, 130
_TRAINING_ONLY = ("optim", "strategy", "recipe", "trainer", "loss", "preference", "lora")
"""What a recipe brings along besides model and data."""
_STAND_IN = "the embedded miniature's tokenizer"
_STAND_IN_ROWS = 40
"""Rows of each kind that it learns from; more teach it nothing new."""


def main() -> None:
    """The command: exit code 0, 1 where too many rows are rejected, 2 with a message for a mistake of the user's."""
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="audit")
    def task(composed: DictConfig) -> None:
        codes.append(CRASH)
        codes[-1] = run(composed)

    try:
        sys.argv[1:] = forced(sys.argv[1:])
        task()
    except ConfigError as error:
        sys.exit(_mistake(error))
    except SystemExit as stop:
        # Hydra has said what is wrong, but its exit code would be that of too many rejects.
        sys.exit(max(codes, default=MISTAKE) if stop.code else 0)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(max(codes, default=0))


def run(composed: DictConfig) -> int:
    """Audit what a composed configuration names; returns the exit code."""
    try:
        config = read_config(composed)
        folder = checked_places(config.output, config.drop)
    except ConfigError as error:
        return _mistake(error)
    log = folder / ERROR_NAME
    try:
        audit = _audit(config)
    except ValueError as error:
        # Meta files, tokenizers and exclusion lists raise it with a sentence for the user.
        log.write_text(traceback.format_exc(), encoding="utf-8")
        return _mistake(error, log)
    try:
        return _write(audit, config, folder)
    except OSError as error:
        # Without a number it is ours, with a sentence of its own.
        place = error.filename or folder
        return _mistake(ConfigError(f"{place} cannot be written ({error.strerror})") if error.errno else error)


def _write(audit: Audit, config: AuditConfig, folder: Path) -> int:
    from ivl_lightning.reporting.audit.files import drop_list, write_audit, write_drop_list

    command = shlex.join(["ivl-audit", *(override.lstrip("+") for override in HydraConfig.get().overrides.task)])
    page = write_audit(audit, folder, command)
    print(f"{audit.verdict.sentence}\naudit: {page}")
    if config.drop is not None:
        exclude = None if config.data.exclude is None else Path(config.data.exclude).expanduser()
        write_drop_list(Path(config.drop).expanduser(), drop_list(audit.flagged, config.drop_rules), exclude)
    return OVER_LIMIT if audit.over_limit else 0


def read_config(composed: DictConfig) -> AuditConfig:
    """Check the composed settings.

    Raises:
        ConfigError: names every missing, misspelt or wrong one.
    """
    config = load(
        AuditConfig, {key: value for key, value in values_without_stages(composed).items() if key not in _TRAINING_ONLY}
    )
    for name in ("rows", "examples", "seed"):
        if (number := getattr(config, name)) is not None and number < 0:
            raise ConfigError(f"{name}={number} must be at least 0")
    return config


def _audit(config: AuditConfig) -> Audit:
    # Imported late: --help and wrong settings need neither torch nor transformers.
    from ivl_lightning.data.corpus import read_corpus
    from ivl_lightning.data.encoding import RowEncoder, encoder_factory
    from ivl_lightning.data.exclusion import check_exclusions
    from ivl_lightning.data.pair_encoding import PairEncoder
    from ivl_lightning.reporting.audit.audit import audit_corpus

    _quiet()
    tokenizer = _tokenizer(config)
    geometry = _geometry(config)
    make = partial(
        encoder_factory,
        config.data,
        tokenizer,
        template=geometry.template,
        tile_tokens=geometry.tokens_per_tile,
        encoder=PairEncoder if config.stage.rows == "pairs" else RowEncoder,
    )
    train, validation = make(training=True), make(training=False)
    # In a log file a bar would leave nothing but blank lines.
    show, cache = config.progress_bar and sys.stderr.isatty(), config.data.cache_dir
    read = partial(
        read_corpus,
        cache_dir=None if cache is None else Path(cache).expanduser(),
        progress=show,
        workers=config.data.index_workers,
        exclude=config.data.exclude,
    )
    corpus = read(config.data.meta, train)
    val_corpus = None if config.data.val_meta is None else read(config.data.val_meta, validation)
    indexes = [*corpus.indexes, *(() if val_corpus is None else val_corpus.indexes)]
    check_exclusions(config.data.exclude, indexes)
    return audit_corpus(
        corpus,
        config.data,
        geometry,
        val_factory=validation,
        val_corpus=val_corpus,
        rows=config.rows,
        examples=config.examples,
        seed=config.seed,
        show=show,
    )


def _tokenizer(config: AuditConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the miniature's where none is given."""
    from ivl_lightning.launch.network import tokenizer_of
    from ivl_lightning.models.tokenizer import load_tokenizer

    if config.model.tokenizer or config.model.path:
        return tokenizer_of(config.model)
    from ivl_lightning.miniature.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        prepare(folder, rows=_STAND_IN_ROWS, val_rows=1)
        return load_tokenizer(Path(folder) / "tokenizer")


def _geometry(config: AuditConfig) -> Geometry:
    """Tiles and tokens of a tile, from the model's folder, its shapes, or InternVL's own.

    Raises:
        ConfigError: tiles of another size than the vision tower takes.
    """
    from ivl_lightning.constants import PATCH_SIZE
    from ivl_lightning.data.layout import tokens_per_tile
    from ivl_lightning.data.plan import DEFAULT_COST
    from ivl_lightning.launch.network import chosen_template, cost_of, shapes_of
    from ivl_lightning.models import parts
    from ivl_lightning.reporting.audit.audit import Geometry

    model, tile_size = config.model, config.data.tile_size
    if model.language_model or model.path is not None:
        shapes = shapes_of(model)
        side, patch, ratio = parts.tile_size(shapes), parts.patch_size(shapes), shapes.downsample_ratio
        cost = cost_of(model, config.stage, shapes)
    else:
        side, patch = model.vision.get("image_size", tile_size), model.vision.get("patch_size", PATCH_SIZE)
        ratio, cost = model.downsample_ratio, DEFAULT_COST
    if side != tile_size:
        raise ConfigError(f"data.tile_size={tile_size}, but the vision tower takes {side}: make them equal")
    source = model.tokenizer or model.path
    return Geometry(
        tokenizer=_STAND_IN if source is None else source,
        exact=source is not None,
        template=chosen_template(model),
        tile_size=tile_size,
        patch_size=patch,
        tokens_per_tile=tokens_per_tile(tile_size, patch, ratio),
        cost=cost,
    )


def _quiet() -> None:
    """What the libraries say about themselves is of no use to the user of this command."""
    # "Token indices sequence length is longer than ...": the caps of the audit are its own.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    # "generated new fontManager"
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


def _mistake(error: Exception, log: Path | None = None) -> int:
    print(f"error: {error}{'' if log is None else f' (details: {log})'}", file=sys.stderr)
    return MISTAKE


if __name__ == "__main__":
    main()
