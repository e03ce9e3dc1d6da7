"""The data of every stage of a run, measured before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from ivl_lightning.checkpoints.run_folders import weights_folder
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.ledger import Ledger, TooManyRejectsError
from ivl_lightning.launch.chain import prepare
from ivl_lightning.launch.network import tokenizer_of, with_template
from ivl_lightning.launch.run_stage import build_datamodule


def measure_stages(configs: Mapping[str, RunConfig]) -> bool:
    """Make the index of each stage's data where it is not there yet, and print what was found.

    Args:
        configs: stage name -> its configuration.

    Returns:
        Whether the rejects of every stage are within `data.reject_limit`.

    Raises:
        ValueError: a wrong setting, meta file or tokenizer, or no `data.cache_dir` to keep an index in.
    """
    console, within = Console(), True
    for name, config in configs.items():
        if config.data.cache_dir is None:
            raise ConfigError("data.cache_dir=null: give a folder, where training will look for the index")
        if config.init_from is not None:
            config = replace(config, init_from=str(weights_folder(config.init_from)))
        prepared, weights = config.data.prepare, config.init_from or config.model.path
        if prepared is not None and prepared.needs_weights and weights is None:
            console.print(f"{name}: its data are made by the stage itself, from the weights it starts from")
            continue
        if prepared is not None:
            prepare(prepared, weights)
        config = replace(config, model=with_template(config.model, config.init_from))
        datamodule = build_datamodule(config, tokenizer_of(config.model, config.init_from))
        train, validation = datamodule.read_corpora(progress=True, look_again=True)
        answers = datamodule.read_answers(progress=True, look_again=True)
        console.print(_table(name, train, validation, answers))
        corpora = [corpus for corpus in (train, validation, answers) if corpus is not None]
        within &= _within_limit(corpora, config.data.reject_limit, console)
    return within


def _table(stage: str, train: Corpus, validation: Corpus | None, answers: Corpus | None) -> Table:
    table = Table("data", "dataset", "rows", "rejected", "tokens", "labels", "tiles", title=stage)
    for kind, corpus in (("training", train), ("validation", validation), ("questions", answers)):
        for index in corpus.indexes if corpus is not None else ():
            sums = [f"{int(index.columns[column].sum()):,}" for column in ("tokens", "labels", "tiles")]
            table.add_row(kind, index.name, f"{len(index):,}", f"{len(index.rejects):,}", *sums)
    return table


def _within_limit(corpora: list[Corpus], limit: float, console: Console) -> bool:
    ledger = Ledger(None)
    rejects = [line for corpus in corpora for line in corpus.rejects]
    ledger.add(rejects)
    try:
        ledger.check(sum(map(len, corpora)) + ledger.counted, limit, rejects)
    except TooManyRejectsError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return False
    return True
