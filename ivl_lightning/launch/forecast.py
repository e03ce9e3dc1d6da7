"""The stages of a run for the forecast: shapes, what trains, and what their packs hold; nothing is measured or made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import InternVLConfig, PreTrainedTokenizerBase

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.plan import PlanConfig
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.data.corpus import Corpus, cached_corpus, hold_back
from ivl_lightning.data.encoding import RowEncoder, encoder_factory
from ivl_lightning.data.horizon import horizon
from ivl_lightning.data.pair_encoding import PairEncoder
from ivl_lightning.data.plan import TrainingPlan
from ivl_lightning.data.stream import mixture_of, plan_of, plan_settings
from ivl_lightning.launch.network import chosen_template, cost_of, shapes_of, tokenizer_of, trained_parts
from ivl_lightning.launch.outline import steps_of
from ivl_lightning.launch.outline_inputs import known_rows
from ivl_lightning.launch.run_stage import initial_settings
from ivl_lightning.models.parts import text_config
from ivl_lightning.planning.forecast import Forecast, forecast_stage
from ivl_lightning.planning.load import planned_load
from ivl_lightning.planning.network import Network, plan_network
from ivl_lightning.planning.remedies import Remedy, remedies


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A stage of the run.

    Attributes:
        config: its configuration.
        forecast: as it is.
        steps: of the run; None where only measured data tell.
        exact: whether the steps are counted, not estimated.
        remedies: what to change where it does not fit.
        notes: what could not be known, for people.
    """

    config: RunConfig
    forecast: Forecast
    steps: int | None
    exact: bool
    remedies: list[Remedy]
    notes: list[str]


def forecast_stages(
    configs: Mapping[str, RunConfig], plan: PlanConfig, *, stand_in: Callable[[], int]
) -> dict[str, StageForecast]:
    """Forecast every stage of a run.

    Args:
        configs: stage name -> its configuration.
        plan: what is taken for granted.
        stand_in: tokens of the tokenizer that a run makes with its data, where it is not made yet.

    Raises:
        ValueError: a model, meta file or tokenizer that cannot be used.
    """
    return {name: _forecast(config, plan, stand_in) for name, config in configs.items()}


def _forecast(config: RunConfig, plan: PlanConfig, stand_in: Callable[[], int]) -> StageForecast:
    notes: list[str] = []
    shapes, tokenizer = shapes_of(initial_settings(config)), _tokenizer(config)
    text = text_config(shapes)
    text.vocab_size = _vocabulary(config, text.vocab_size, tokenizer, stand_in, notes)
    packing = None if tokenizer is None else _plan(config, shapes, tokenizer)
    load = None
    if packing is None:
        notes.append("the data are not measured (ivl-index): every pack is taken to be full")
    else:
        load = planned_load(packing, config.trainer.devices * config.trainer.num_nodes, packs=plan.planned_packs)
    steps, exact = _steps(config, packing)
    own = partial(forecast_stage, network=_network(config, shapes), plan=plan, load=load)
    forecast = own(config)
    changes = [] if forecast.fits else remedies(config, partial(_changed, config=config, own=own, plan=plan))
    return StageForecast(config, forecast, steps, exact, changes, notes)


def _changed(changed: RunConfig, *, config: RunConfig, own: Callable[..., Forecast], plan: PlanConfig) -> Forecast:
    """A changed stage; packs of other caps were not planned."""
    other_packs = changed.data != config.data
    return own(changed, load=None) if other_packs else own(changed)


def _network(config: RunConfig, shapes: InternVLConfig) -> Network:
    return plan_network(
        shapes,
        trained_parts(config.stage, config.lora),
        dtype=config.model.dtype,
        last_vision_layers=config.stage.trainable_vision_layers,
        lora=config.lora,
    )


def _tokenizer(config: RunConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that training would take, if it is there."""
    # "Token indices sequence length is longer than ...": nobody asked it to read.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    source = config.model.tokenizer or config.init_from or config.model.path or config.model.language_model_path
    if source is None or not Path(source).exists():
        return None
    return tokenizer_of(config.model, config.init_from)


def _vocabulary(
    config: RunConfig,
    known: int,
    tokenizer: PreTrainedTokenizerBase | None,
    stand_in: Callable[[], int],
    notes: list[str],
) -> int:
    """Rows of embeddings and head, as `models.build` has them."""
    given = "vocab_size" in config.model.language_model or config.model.path is not None or config.init_from is not None
    if tokenizer is not None:
        return max(len(tokenizer), known) if given else len(tokenizer)
    if given:
        return known
    if _is_made_with_the_data(config):
        return stand_in()
    notes.append(f"the vocabulary is not known: {known:,} tokens are taken; give model.tokenizer=FOLDER")
    return known


def _is_made_with_the_data(config: RunConfig) -> bool:
    prepared, tokenizer = config.data.prepare, config.model.tokenizer
    if prepared is None or tokenizer is None:
        return False
    return Path(tokenizer).absolute().is_relative_to(Path(prepared.folder).absolute())


def _plan(config: RunConfig, shapes: InternVLConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingPlan | None:
    """The plan of training over measured data; None where they are not measured."""
    corpus = _corpus(config, shapes, tokenizer)
    if corpus is None:
        return None
    if config.data.val_rows:
        corpus, _ = corpus.split(hold_back(corpus.column("question"), config.data.val_rows))
    settings = plan_settings(
        config.data,
        seed=config.seed,
        # How labels are weighed does not decide what is packed.
        reduction="token",
        cost=cost_of(config.model, config.stage, shapes, config.lora),
        epochs=None if config.trainer.max_steps is not None else config.trainer.max_epochs,
        pairs=corpus.pairs,
    )
    mixture = mixture_of(corpus, config.data)
    return plan_of(corpus.view([share.name for share in mixture]), mixture, settings)


def _corpus(config: RunConfig, shapes: InternVLConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus | None:
    data = config.data
    if data.cache_dir is None or not Path(data.meta).is_file():
        return None
    factory = encoder_factory(
        data,
        tokenizer,
        template=chosen_template(config.model, config.init_from),
        tile_tokens=shapes.image_seq_length,
        training=True,
        encoder=PairEncoder if config.stage.rows == "pairs" else RowEncoder,
    )
    return cached_corpus(data.meta, factory, cache_dir=Path(data.cache_dir).expanduser(), exclude=data.exclude)


def _steps(config: RunConfig, packing: TrainingPlan | None) -> tuple[int | None, bool]:
    if packing is None:
        return steps_of(config, known_rows(config.data))
    assert config.data.cache_dir is not None
    cache = Path(config.data.cache_dir).expanduser()
    found = horizon(packing, max_steps=config.trainer.max_steps, epochs=packing.settings.epochs, cache_dir=cache)
    if found is None:
        raise ConfigError("the run has no end: give trainer.max_steps or trainer.max_epochs")
    return found.steps, not found.estimated
