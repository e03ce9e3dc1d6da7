"""Rules between settings, checked before anything is loaded."""

from __future__ import annotations

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.loggers import logger_faults
from ivl_lightning.config.lora import lora_faults
from ivl_lightning.config.schema import RunConfig, StrategyConfig


def validate(config: RunConfig) -> None:
    """Check one stage's configuration.

    Raises:
        ConfigError: lists every contradiction, with both values and what to do.
    """
    faults = [*_length_faults(config), *_strategy_faults(config), *_data_faults(config), *_model_faults(config)]
    faults += [
        *_eval_faults(config),
        *_probe_faults(config),
        *lora_faults(config),
        *_scaling_faults(config),
        *_launcher_faults(config),
        *logger_faults(config.logger),
    ]
    if config.replay is not None and config.replay < 0:
        faults.append(f"replay={config.replay} is a number of finished steps, 0 for the first step, or null to train")
    faults += _preference_faults(config) if config.stage.rows == "pairs" else _batch_faults(config)
    if faults:
        raise ConfigError(f"stage {config.stage.name}:\n" + "\n".join(faults))


def _length_faults(config: RunConfig) -> list[str]:
    trainer, optim = config.trainer, config.optim
    faults = []
    if trainer.max_steps is not None and trainer.max_steps < 1:
        faults.append(f"trainer.max_steps={trainer.max_steps} must be at least 1, or null for trainer.max_epochs")
    if trainer.max_steps is None and trainer.max_epochs < 1:
        faults.append(f"trainer.max_epochs={trainer.max_epochs} must be at least 1 where trainer.max_steps is null")
    if optim.warmup_steps is not None and trainer.max_steps is not None and optim.warmup_steps > trainer.max_steps:
        faults.append(f"optim.warmup_steps={optim.warmup_steps} is more than trainer.max_steps={trainer.max_steps}")
    if not 0.0 <= optim.warmup_ratio <= 1.0:
        faults.append(f"optim.warmup_ratio={optim.warmup_ratio} must lie between 0 and 1")
    if len(optim.betas) != 2:
        faults.append(f"optim.betas={optim.betas} must be two numbers")
    return faults


def _strategy_faults(config: RunConfig) -> list[str]:
    trainer, strategy = config.trainer, config.strategy
    ranks = trainer.devices * trainer.num_nodes
    faults = []
    if strategy.name == "single" and ranks > 1:
        faults.append(
            f"strategy=single runs one process, but trainer.devices={trainer.devices} and "
            f"trainer.num_nodes={trainer.num_nodes} ask for {ranks}: add strategy=ddp, strategy=fsdp or strategy=hsdp"
        )
    faults += _sharding_faults(config)
    if ranks > 0 and config.data.packs_per_step % ranks:
        faults.append(
            f"data.packs_per_step={config.data.packs_per_step} cannot be dealt to {ranks} ranks evenly: "
            "make it a multiple"
        )
    return faults


def _sharding_faults(config: RunConfig) -> list[str]:
    trainer, strategy = config.trainer, config.strategy
    faults = []
    if strategy.prefetch < 0:
        faults.append(f"strategy.prefetch={strategy.prefetch} is a number of blocks, or 0 for the library's own choice")
    if strategy.shard_size is not None and strategy.name != "hsdp":
        faults.append(
            f"strategy.shard_size={strategy.shard_size} has no effect with strategy={strategy.name}: add strategy=hsdp"
        )
    if strategy.name not in ("fsdp", "hsdp"):
        return faults + _unused_switches(strategy)
    if trainer.precision != "32-true":
        faults.append(
            f"trainer.precision={trainer.precision} under strategy={strategy.name} would make optimizer state lose "
            "precision: use trainer.precision=32-true with strategy.param_dtype=bfloat16"
        )
    ranks = trainer.devices * trainer.num_nodes
    shard_size = trainer.devices if strategy.shard_size is None else strategy.shard_size
    if strategy.name == "hsdp" and (shard_size < 1 or ranks % shard_size):
        faults.append(
            f"strategy.shard_size={shard_size} cannot part {ranks} ranks (trainer.devices={trainer.devices} x "
            f"trainer.num_nodes={trainer.num_nodes}) into equal groups: make it a divisor"
        )
    return faults


def _unused_switches(strategy: StrategyConfig) -> list[str]:
    """Switches that somebody gave to a strategy that keeps whole copies."""
    given = {
        "sync_every_micro_batch": strategy.sync_every_micro_batch,
        "cpu_offload": strategy.cpu_offload,
        "prefetch": max(strategy.prefetch, 0),
    }
    return [
        f"strategy.{name}={str(value).lower()} needs sharded weights, but strategy={strategy.name}: add strategy=fsdp "
        "or strategy=hsdp"
        for name, value in given.items()
        if value
    ]


def _data_faults(config: RunConfig) -> list[str]:
    data = config.data
    faults = []
    if data.min_tiles < 1 or data.max_tiles < data.min_tiles or data.val_max_tiles < 1:
        faults.append(
            f"data.min_tiles={data.min_tiles}, data.max_tiles={data.max_tiles}, "
            f"data.val_max_tiles={data.val_max_tiles}: each at least 1, and max_tiles not below min_tiles"
        )
    if not 1 <= data.min_frames <= data.max_frames:
        faults.append(
            f"data.min_frames={data.min_frames}, data.max_frames={data.max_frames}: at least 1, and max not below min"
        )
    if data.index_workers is not None and data.index_workers < 1:
        faults.append(f"data.index_workers={data.index_workers} must be at least 1, or null for one per core")
    if not 0.0 <= data.reject_limit <= 1.0:
        faults.append(f"data.reject_limit={data.reject_limit} is a share between 0 and 1")
    if data.val_meta is not None and data.val_rows:
        faults.append(f"data.val_meta={data.val_meta} and data.val_rows={data.val_rows}: give one of them")
    return faults


def _eval_faults(config: RunConfig) -> list[str]:
    limits, rows = config.eval.max_tiles, config.data.generation_rows
    if limits is None:
        return []
    faults = []
    if not limits or min(limits) < 1 or len(set(limits)) < len(limits):
        faults.append(f"eval.max_tiles={limits} must be different numbers of at least 1, or null for no curve")
    if rows == 0:
        faults.append(f"eval.max_tiles={limits} answers the rows of data.generation_rows={rows}: raise that, or null")
    return faults


def _probe_faults(config: RunConfig) -> list[str]:
    rows, every = config.eval.probe_rows, config.eval.probe_every_n_steps
    faults = []
    if rows < 0:
        faults.append(f"eval.probe_rows={rows} must be at least 1, or 0 to ask nothing")
    if every is not None and every < 1:
        faults.append(f"eval.probe_every_n_steps={every} must be at least 1, or null to ask with validations only")
    return faults


def _batch_faults(config: RunConfig) -> list[str]:
    batch, packs = config.data.batch_samples, config.data.packs_per_step
    if batch is None or 1 <= packs <= batch:
        return []
    if batch < 1:
        return [f"data.batch_samples={batch} must be at least 1, or null to fill packs"]
    return [_empty_packs("batch_samples", batch, packs)]


def _empty_packs(setting: str, batch: int, packs: int) -> str:
    return (
        f"data.{setting}={batch} is less than data.packs_per_step={packs}, so packs would stay empty: lower "
        f"packs_per_step (a multiple of the ranks), or raise {setting}"
    )


def _preference_faults(config: RunConfig) -> list[str]:
    preference, data = config.preference, config.data
    faults = []
    if preference.beta <= 0:
        faults.append(f"preference.beta={preference.beta} must be above 0")
    if preference.max_reward <= 0:
        faults.append(f"preference.max_reward={preference.max_reward} must be above 0")
    for name, part in preference.parts.items():
        if part is not None and (set(part) != {"weight", "head"} or "_target_" not in (part["head"] or ())):
            faults.append(f"preference.parts.{name} needs `weight` and a `head` with `_target_`, or null")
    if not any(part is not None for part in preference.parts.values()):
        faults.append("preference.parts names no part: choose preference=mpo or preference=dpo")
    if data.batch_pairs < data.packs_per_step:
        faults.append(_empty_packs("batch_pairs", data.batch_pairs, data.packs_per_step))
    if data.over_length == "truncate":
        faults.append("data.over_length=truncate would cut answers of preference pairs: use reject or shrink")
    if config.model.attention != "ivl_packed":
        faults.append(
            f"model.attention={config.model.attention} cannot let two answers share a prompt: use ivl_packed for this "
            "stage"
        )
    return faults


def _launcher_faults(config: RunConfig) -> list[str]:
    launcher, trainer = config.launcher, config.trainer
    if launcher.jobs is not None and launcher.jobs < 1:
        return [f"launcher.jobs={launcher.jobs} must be at least 1, or null for as many as the GPUs allow"]
    if launcher.name != "slurm":
        return []
    faults = []
    if (launcher.nodes, launcher.tasks_per_node) != (trainer.num_nodes, trainer.devices):
        faults.append(
            f"launcher.nodes={launcher.nodes} and launcher.tasks_per_node={launcher.tasks_per_node}, but "
            f"trainer.num_nodes={trainer.num_nodes} and trainer.devices={trainer.devices}: set trainer's, and leave "
            "launcher's to follow"
        )
    if not 0 <= launcher.signal_seconds < 60 * launcher.time_minutes:
        faults.append(
            f"launcher.signal_seconds={launcher.signal_seconds} must lie within "
            f"launcher.time_minutes={launcher.time_minutes}"
        )
    return faults


def _scaling_faults(config: RunConfig) -> list[str]:
    donor = config.scaling.donor
    bringers = [entry for entry in config.callbacks.values() if entry is not None and entry.get("donor") == donor]
    if donor is None or bringers:
        return []
    return [
        f"scaling.donor={donor}, but no callback brings its tower: keep callbacks.progressive_scaling "
        "(callbacks=default)"
    ]


def _model_faults(config: RunConfig) -> list[str]:
    model, recipe = config.model, config.recipe
    faults = []
    if recipe.model is not None and recipe.model != model.name:
        faults.append(
            f"recipe={recipe.name} has the numbers of model={recipe.model}, but model={model.name}: "
            "add recipe=none to set them yourself"
        )
    tile = model.vision.get("image_size")
    if isinstance(tile, int) and tile != config.data.tile_size:
        faults.append(f"data.tile_size={config.data.tile_size}, but model.vision.image_size={tile}: make them equal")
    if not 0.0 <= config.stage.drop_path_rate < 1.0:
        faults.append(f"stage.drop_path_rate={config.stage.drop_path_rate} must be at least 0 and below 1")
    if config.stage.trainable == []:
        faults.append("stage.trainable=[] trains nothing: name vision, projector or llm, or null for the stage's own")
    return faults
