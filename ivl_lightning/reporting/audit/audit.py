"""The audit of a corpus: everything that is found, in one record."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.encoding import EncoderFactory
from ivl_lightning.data.stream import mixture_of
from ivl_lightning.reporting.audit.concerns import concerns_of
from ivl_lightning.reporting.audit.findings import Concern, DatasetFacts, Forecast, Verdict
from ivl_lightning.reporting.audit.flagged import Flagged
from ivl_lightning.reporting.audit.forecast import forecast
from ivl_lightning.reporting.audit.opened import Example, open_rows
from ivl_lightning.reporting.audit.scan import ScanResult, scan_rows
from ivl_lightning.reporting.audit.statistics import dataset_facts
from ivl_lightning.reporting.audit.subject import Subject
from ivl_lightning.reporting.audit.validation import Validation, split_validation
from ivl_lightning.reporting.audit.verdict import OVER_LIMIT, Tally, verdict
from ivl_lightning.structures import Reject, RowKey


@dataclass(frozen=True, slots=True)
class Geometry:
    """What decides token counts besides the data.

    Attributes:
        tokenizer: where it comes from, in words.
        exact: whether it is the model's own; with another one token counts are approximate.
        template: chat template.
        tile_size, patch_size, tokens_per_tile: of the vision tower.
        cost: modeled work per token, per squared document length, per tile; see `models.cost`.
    """

    tokenizer: str
    exact: bool
    template: str
    tile_size: int
    patch_size: int
    tokens_per_tile: int
    cost: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found.

    Attributes:
        meta: file that names the datasets.
        pairs: whether rows are preference pairs.
        config: settings of the data.
        geometry: of tokenizer and tiles.
        verdict: the whole in a sentence.
        datasets: their numbers.
        rejects: every row that cannot be used, by dataset and line.
        validation: what measuring the validation data found; None without.
        warnings: what to decide on.
        flagged: rows that break a quality rule.
        checked: rows that the quality rules saw.
        packing: forecast of an epoch; None without a sample.
        examples: rows as the model sees them, one list per dataset.
    """

    meta: str
    pairs: bool
    config: DataConfig
    geometry: Geometry
    verdict: Verdict
    datasets: list[DatasetFacts]
    rejects: list[Reject]
    validation: Validation | None
    warnings: list[Concern]
    flagged: list[Flagged]
    checked: int
    packing: Forecast | None
    examples: list[list[Example]]

    @property
    def over_limit(self) -> bool:
        """Whether a run with these settings would stop because of rejected rows."""
        return self.verdict.state == OVER_LIMIT

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values and records that `files.as_text` takes apart."""
        return {
            "meta": self.meta,
            "rows": "pairs" if self.pairs else "conversations",
            "verdict": self.verdict,
            "counts": {
                facts.name: {"rows": facts.rows, "used": facts.used, "rejected": sum(facts.rejected.values())}
                for facts in self.datasets
            },
            "rejected": self.rejects,
            "validation": self.validation,
            "warnings": self.warnings,
            "quality": {
                "checked": self.checked,
                "counts": dict(Counter(line.rule for line in self.flagged).most_common()),
                "hits": self.flagged,
            },
            "packing": self.packing,
            "datasets": self.datasets,
            "examples": {facts.name: examples for facts, examples in zip(self.datasets, self.examples, strict=True)},
            "geometry": self.geometry,
            "data": asdict(self.config),
        }


def audit_corpus(
    corpus: Corpus,
    config: DataConfig,
    geometry: Geometry,
    *,
    val_factory: EncoderFactory,
    val_corpus: Corpus | None,
    rows: int | None,
    examples: int,
    seed: int,
    show: bool,
) -> Audit:
    """Look at an indexed corpus.

    Args:
        corpus: as indexed under `config`.
        config: settings of the data.
        geometry: of tokenizer and tiles.
        val_factory: makes encoders with the settings of validation.
        val_corpus: rows of `data.val_meta`; None without.
        rows: of each dataset that are opened; None opens all.
        examples: of each dataset that are shown.
        seed: of mixture, packing and augmentation.
        show: progress bars.

    Raises:
        ValueError: weights that do not name the datasets, or `val_rows` that leaves nothing to train on.
    """
    train, validation = split_validation(corpus, config, val_factory, val_corpus)
    # Wrong weights are known now, not after hours of reading.
    mixture_of(train, config)
    scan = scan_rows(corpus, exact=geometry.exact, show=show)
    opened = open_rows(corpus, scan.scans, rows=rows, examples=examples, seed=seed, show=show)
    rejects = _by_dataset(corpus, {**scan.broken, **opened.broken}, scan.uncertain)
    facts = dataset_facts(corpus, train, config, scan.scans, opened, rejects)
    subjects = _subjects(corpus, config, geometry, facts, scan, rejects)
    warnings = [concern for subject in subjects for concern in concerns_of(subject)]
    tallies = [_tally(subject) for subject in subjects]
    return Audit(
        meta=config.meta,
        pairs=corpus.pairs,
        config=config,
        geometry=geometry,
        verdict=verdict([*tallies, *([validation.tally] if validation else [])], config.reject_limit, len(warnings)),
        datasets=facts,
        rejects=[line for lines in rejects for line in lines],
        validation=validation,
        warnings=warnings,
        flagged=scan.flagged,
        checked=scan.checked,
        packing=forecast(train, config, seed, cost=geometry.cost, show=show),
        examples=opened.examples,
    )


def _by_dataset(corpus: Corpus, broken: dict[int, Reject], uncertain: frozenset[RowKey]) -> list[list[Reject]]:
    """All rejects of each dataset, by line."""
    rejects = [[_marked(line, uncertain) for line in index.rejects] for index in corpus.indexes]
    for row, line in broken.items():
        rejects[corpus.dataset_of(row)].append(line)
    return [sorted(lines, key=lambda line: (line.line, line.offset)) for lines in rejects]


def _marked(line: Reject, uncertain: frozenset[RowKey]) -> Reject:
    if line.row not in uncertain:
        return line
    return replace(line, message=f"not certain: approximate tokens, give model.tokenizer. {line.message}")


def _subjects(
    corpus: Corpus,
    config: DataConfig,
    geometry: Geometry,
    facts: list[DatasetFacts],
    scan: ScanResult,
    rejects: list[list[Reject]],
) -> list[Subject]:
    flagged: dict[str, list[Flagged]] = {spec.name: [] for spec in corpus.specs}
    for line in scan.flagged:
        flagged[line.dataset].append(line)
    return [
        Subject(
            spec=spec,
            index=corpus.indexes[number],
            facts=facts[number],
            scan=scan.scans[number],
            rejects=rejects[number],
            uncertain=[line for line in rejects[number] if line.row in scan.uncertain],
            flagged=flagged[spec.name],
            config=config,
            tokens_per_tile=geometry.tokens_per_tile,
            alone=len(corpus.specs) == 1,
        )
        for number, spec in enumerate(corpus.specs)
    ]


def _tally(subject: Subject) -> Tally:
    facts = subject.facts
    counted = facts.rows - facts.used - facts.set_aside
    return Tally(
        name=facts.name,
        # As training counts: rows set aside on purpose are no part of it.
        rows=facts.rows - facts.set_aside,
        rejected=counted - len(subject.uncertain),
        uncertain=len(subject.uncertain),
        usable=len(subject.index),
        opened=facts.opened,
        broken=facts.broken,
    )
