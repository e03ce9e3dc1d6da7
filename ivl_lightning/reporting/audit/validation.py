"""Validation data in an audit: measured as training would measure them, not opened."""

from __future__ import annotations

from dataclasses import dataclass

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.corpus import Corpus, hold_back
from ivl_lightning.data.encoding import EncoderFactory
from ivl_lightning.reporting.audit.findings import reasons
from ivl_lightning.reporting.audit.verdict import Tally
from ivl_lightning.structures import Reject


@dataclass(frozen=True, slots=True)
class ValidationFacts:
    """A dataset of the validation data.

    Attributes:
        name: of the dataset.
        rows: measured for validation.
        used: of these.
        rejected: the others, by reason.
    """

    name: str
    rows: int
    used: int
    rejected: dict[str, int]


@dataclass(frozen=True, slots=True)
class Validation:
    """What measuring the validation data found.

    Attributes:
        source: the setting that names them.
        datasets: their numbers.
        rejects: rows that validation cannot use.
        tally: of the rows that the limit does not count among those of training.
    """

    source: str
    datasets: list[ValidationFacts]
    rejects: list[Reject]
    tally: Tally


def split_validation(
    corpus: Corpus, config: DataConfig, factory: EncoderFactory, val_corpus: Corpus | None
) -> tuple[Corpus, Validation | None]:
    """The rows that train, and the validation data.

    Args:
        corpus: rows of `data.meta`.
        config: `val_meta` and `val_rows`.
        factory: makes encoders with the settings of validation.
        val_corpus: rows of `data.val_meta`; None without.

    Raises:
        ValueError: `val_rows` would leave nothing to train on.
    """
    if val_corpus is not None:
        return corpus, _validation(f"data.val_meta={config.val_meta}", val_corpus, apart=True)
    if not config.val_rows or not len(corpus):
        return corpus, None
    train, held_back = corpus.split(hold_back(corpus.column("question"), config.val_rows))
    measured = held_back.measured_again(factory)
    return train, _validation(f"data.val_rows={config.val_rows}", measured, apart=False)


def _validation(source: str, corpus: Corpus, *, apart: bool) -> Validation:
    """Facts of a validation corpus; `apart` where its rows are none of `data.meta`."""
    rejects = list(corpus.rejects)
    counted = sum(line.counted for line in rejects)
    return Validation(
        source=source,
        datasets=[
            ValidationFacts(index.name, len(index) + len(index.rejects), len(index), reasons(list(index.rejects)))
            for index in corpus.indexes
        ],
        rejects=rejects,
        tally=Tally("validation", len(corpus) + counted if apart else 0, counted),
    )
