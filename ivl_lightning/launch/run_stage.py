"""One stage in one process: read its config.yaml, build, fit, validate, save, mark as finished."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from rich import print as rich_print
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ivl_lightning.checkpoints.complete import checkpoints_in, faults, steps_of
from ivl_lightning.checkpoints.run_folders import tower_folder
from ivl_lightning.checkpoints.source import Combined, MemorySource
from ivl_lightning.checkpoints.weights import full_state_dict
from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.config.schema import LossConfig, ModelConfig, RunConfig
from ivl_lightning.constants import CHECKPOINTS_FOLDER, WEIGHTS_FOLDER
from ivl_lightning.conversion.write import write_trained
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.data.templates import template_of
from ivl_lightning.launch.adapter import ADAPTER_FOLDER, save_adapter
from ivl_lightning.launch.finished import Finished, deciding_settings, weights_hash
from ivl_lightning.launch.loggers import log_settings
from ivl_lightning.launch.network import cost_of, shapes_of, tokenizer_of
from ivl_lightning.launch.replay_step import replay_checkpoint, replay_step
from ivl_lightning.launch.started import note_machine
from ivl_lightning.launch.tile_curve import trace_tile_curve
from ivl_lightning.launch.trainer import build_trainer, newest_checkpoint
from ivl_lightning.losses.mpo import PreferenceMixture
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.build import has_weights, weight_sources
from ivl_lightning.models.checkpoint import Checkpoint
from ivl_lightning.models.donor import open_donor
from ivl_lightning.models.loader import ConfiguredNetwork
from ivl_lightning.models.parts import patch_size, tile_size
from ivl_lightning.stages.base import Stage

CONFIG_NAME = "config.yaml"
RANDOM_WEIGHTS = "random"


def run_stage(folder: Path) -> None:
    """Train the stage whose resolved configuration lies in `folder`.

    Raises:
        ValueError: wrong settings, data or weights.
    """
    config = read_config(folder)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    L.seed_everything(config.seed, verbose=False)
    if config.replay is not None:
        _replay(config, folder)
        return
    tokenizer = tokenizer_of(config.model, config.init_from)
    checkpoint = _told(newest_checkpoint(folder), folder)
    datamodule = build_datamodule(config, tokenizer, look_again=checkpoint is None)
    stage = build_stage(config, tokenizer)
    stage.resumed = checkpoint is not None
    losses, inputs = LossEnds(), InputWeights()
    trainer = build_trainer(config, folder, [losses, inputs])
    if checkpoint is None and trainer.is_global_zero:
        inputs.hash = input_hash(config)
    log_settings(config, trainer)
    note_machine(trainer, folder)
    start = time.monotonic()
    trainer.fit(stage, datamodule, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    if losses.validated_at != trainer.global_step:
        trainer.validate(stage, datamodule, verbose=False)
    state_dict = full_state_dict(stage.internvl)
    if trainer.is_global_zero:
        _write_weights(config, folder, stage, state_dict, tokenizer)
    del state_dict
    # Behind the weights: pictures of many tiles may be more than the memory takes.
    if config.eval.max_tiles is not None:
        trace_tile_curve(trainer, stage, datamodule, folder)
    if trainer.is_global_zero:
        _finish(config, folder, stage, trainer, losses, inputs, datamodule, time.monotonic() - start)
    trainer.strategy.barrier()


def _write_weights(
    config: RunConfig,
    folder: Path,
    stage: Stage,
    state_dict: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The trained network, and its adapters where there are some; `state_dict` is used up."""
    if config.lora.parts:
        base = config.init_from or config.model.path
        save_adapter(stage, state_dict, base, folder / ADAPTER_FOLDER, donor=config.scaling.donor)
    tensors = MemorySource(stage.merged(state_dict), "the trained network")
    write_trained(
        Checkpoint(
            folder,
            stage.internvl.config,
            tensors,
            tokenizer=lambda: tokenizer,
            generation=stage.internvl.generation_config,
        ),
        folder / WEIGHTS_FOLDER,
    )


def _replay(config: RunConfig, folder: Path) -> None:
    """One step again; see `launch.replay`."""
    tokenizer = tokenizer_of(config.model, config.init_from)
    stage = build_stage(config, tokenizer)
    stage.resumed = replay_checkpoint(config, folder) is not None
    replay_step(config, folder, stage, build_datamodule(config, tokenizer))


@rank_zero_only
def _say(message: str) -> None:
    rich_print(message)


def _told(checkpoint: Path | None, folder: Path) -> Path | None:
    """The checkpoint to go on from; people are told which, and which newer ones a save has left unfinished."""
    left = {path.name: faults(path) for path in checkpoints_in(folder / CHECKPOINTS_FOLDER) if faults(path)}
    for name, found in left.items():
        _say(f"[yellow]{name} is left out[/yellow]: {', '.join(found)}")
    if checkpoint is not None:
        _say(f"goes on behind step {steps_of(checkpoint)}, from {checkpoint}")
    return checkpoint


class LossEnds(Callback):
    """Remembers the first and the last training loss, over restarts too, and step and scores of the last validation."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = float("nan")
        self.validated_at: int | None = None
        self.scores: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Read the loss of a finished step."""
        loss = trainer.callback_metrics.get("train/loss")
        if loss is None:
            return
        self.last = float(loss)
        if self.first is None:
            self.first = self.last

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The scores of this step need not be taken again."""
        self.validated_at = trainer.global_step
        metrics = trainer.callback_metrics
        self.scores = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}

    def state_dict(self) -> dict[str, Any]:
        """Kept in checkpoints."""
        return {"first": self.first, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self.first, self.last = state_dict["first"], state_dict["last"]


class InputWeights(Callback):
    """Remembers the hash of the weights that the stage began with, over restarts too: they may be gone in the end."""

    def __init__(self) -> None:
        self.hash: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Kept in checkpoints."""
        return {"hash": self.hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self.hash = state_dict["hash"]


def _finish(
    config: RunConfig,
    folder: Path,
    stage: Stage,
    trainer: L.Trainer,
    losses: LossEnds,
    inputs: InputWeights,
    datamodule: DynamicPackingDataModule,
    seconds: float,
) -> None:
    Finished(
        stage=config.stage.name,
        settings=deciding_settings(config),
        input_weights=inputs.hash or input_hash(config),
        output_weights=weights_hash(folder / WEIGHTS_FOLDER),
        trained=stage.trained_names,
        steps=trainer.global_step,
        loss_first=float("nan") if losses.first is None else losses.first,
        loss_last=losses.last,
        scores=losses.scores,
        seconds=seconds,
        rejected=dict(datamodule.ledger.counts),
        averaged=stage.averaged,
    ).write(folder)


def read_config(folder: Path) -> RunConfig:
    """The stage's resolved configuration."""
    return load(RunConfig, yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8")))


def write_config(config: RunConfig, folder: Path) -> None:
    """Write config.yaml, what the stage's process reads."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def input_hash(config: RunConfig) -> str:
    """Hash of the weights a stage starts from."""
    sources = weight_sources(initial_settings(config))
    if config.scaling.donor is not None:
        sources.append(str(tower_folder(config.scaling.donor)))
    if not sources:
        return RANDOM_WEIGHTS
    hashes = [weights_hash(Path(source)) for source in sources]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def build_datamodule(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, look_again: bool = False
) -> DynamicPackingDataModule:
    """The data of a stage: conversations, or preference pairs.

    Raises:
        ConfigError: tiles of another size than the vision tower takes.
    """
    shapes = shapes_of(initial_settings(config))
    side = tile_size(shapes)
    if side != config.data.tile_size:
        raise ConfigError(f"data.tile_size={config.data.tile_size}, but the vision tower takes {side}: make them equal")
    kind = PreferenceDataModule if config.stage.rows == "pairs" else DynamicPackingDataModule
    return kind(
        config.data,
        tokenizer,
        template=template_of(config.model.template, shapes),
        seed=config.seed,
        patch_size=patch_size(shapes),
        downsample_ratio=shapes.downsample_ratio,
        cost=cost_of(config.model, config.stage, shapes, config.lora),
        tile_limits=config.eval.max_tiles or (),
        look_again=look_again,
    )


def build_stage(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Stage:
    """The LightningModule of a stage; it builds its network when Lightning asks for it.

    Raises:
        ConfigError: random weights that are to be quantized.
    """
    settings = config.stage
    source = config.init_from or config.model.path or config.model.language_model_path
    if config.lora.quantize is not None and source is None:
        raise ConfigError(
            f"lora.quantize={config.lora.quantize} with model.random_weights=true: the weights before they are "
            "quantized are read once more in the end, so give model.path=FOLDER or init_from=RUN"
        )
    stage_class = get_class(settings._target_)
    own = preference_options(config) if settings.rows == "pairs" else {"loss": loss_head(config.loss)}
    return stage_class(
        ConfiguredNetwork(initial_settings(config), tokenizer, seed=config.seed),
        **own,
        optim=config.optim,
        trainable=settings.trainable,
        trainable_vision_layers=settings.trainable_vision_layers,
        drop_path_rate=settings.drop_path_rate,
        activation_checkpointing=config.model.activation_checkpointing,
        generation_tokens=settings.generation_tokens,
        evaluation=config.eval,
        sharding=config.strategy,
        lora=config.lora,
        seed=config.seed,
    )


def loss_head(settings: LossConfig) -> NextTokenLoss:
    """The loss head of a supervised stage.

    Raises:
        ConfigError: there is no such class, or it does not take these arguments.
    """
    arguments = asdict(settings)
    own = arguments.pop("options") or {}
    try:
        head = instantiate({**arguments, **own})
    except InstantiationException as error:
        raise ConfigError(f"loss._target_={settings._target_} cannot be built: {error.__cause__ or error}") from error
    if not isinstance(head, NextTokenLoss):
        raise ConfigError(f"loss._target_={settings._target_} is no subclass of NextTokenLoss (docs/extending.md)")
    return head


def preference_options(config: RunConfig) -> dict[str, Any]:
    """Arguments of the preference stage: its heads, built, and its switches."""
    settings = config.preference
    parts = {name: part for name, part in settings.parts.items() if part is not None}
    return {
        "mixture": PreferenceMixture(
            {name: {**part, "head": _head(name, part["head"])} for name, part in parts.items()}
        ),
        "beta": settings.beta,
        "normaliser": settings.normaliser,
        "reference": settings.reference,
        "max_reward": settings.max_reward,
        "chunk_rows": settings.chunk_rows,
        "weights_id": partial(input_hash, config) if has_weights(initial_settings(config)) else None,
    }


def _head(name: str, settings: dict[str, Any]) -> Any:
    """A head of the mixture.

    Raises:
        ConfigError: there is no such head, or it does not take these arguments.
    """
    try:
        return instantiate(settings)
    except InstantiationException as error:
        raise ConfigError(
            f"preference.parts.{name}.head cannot be built: {error.__cause__ or error}. To take another head, set "
            f"preference.parts.{name}=null and add +preference.parts.NAME={{weight: ..., head: {{_target_: ...}}}}"
        ) from error


def initial_settings(config: RunConfig) -> ModelConfig:
    """The `model` settings a stage starts with: weights of an earlier run take the place of all others.

    Where nothing else has a vision tower, that of the donor describes the network.
    """
    model = config.model
    if config.init_from is not None:
        return replace(model, path=config.init_from, vision_path=None, projector_path=None, language_model_path=None)
    if config.scaling.donor is not None and model.language_model_path and not (model.path or model.vision_path):
        return replace(model, vision_path=str(tower_folder(config.scaling.donor)))
    return model


def initial_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The weights a stage starts from, opened, new rows and parts among them; None for random ones."""
    settings = initial_settings(config)
    if not has_weights(settings):
        return None
    tokenizer = tokenizer_of(config.model, config.init_from)
    checkpoint = ConfiguredNetwork(settings, tokenizer, seed=config.seed).opened()
    if config.scaling.donor is None:
        return checkpoint
    brought = open_donor(config.scaling.donor).brought_to(checkpoint.config, config.scaling.projector)
    return replace(checkpoint, tensors=Combined([checkpoint.tensors, brought]))
