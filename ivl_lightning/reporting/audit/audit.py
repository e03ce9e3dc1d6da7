"""The audit of a corpus: everything that is found, in one record."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.stream import mixture_of
from ivl_lightning.reporting.audit.concerns import concerns_of
from ivl_lightning.reporting.audit.findings import Concern, DatasetFacts, Flagged, Forecast, Verdict
from ivl_lightning.reporting.audit.forecast import forecast
from ivl_lightning.reporting.audit.opened import Example, open_rows
from ivl_lightning.reporting.audit.scan import ScanResult, scan_rows
from ivl_lightning.reporting.audit.statistics import dataset_facts
from ivl_lightning.reporting.audit.subject import Subject
from ivl_lightning.structures import Reject

OK, WARNINGS, OVER_LIMIT = "ok", "warnings", "over_limit"


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
        config: settings of the data.
        geometry: of tokenizer and tiles.
        verdict: the whole in a sentence.
        datasets: their numbers.
        rejects: every row that cannot be used, by dataset and line.
        warnings: what to decide on.
        flagged: rows that break a quality rule.
        checked: rows that the quality rules saw.
        packing: forecast of an epoch; None without a sample.
        examples: rows as the model sees them, one list per dataset.
    """

    meta: str
    config: DataConfig
    geometry: Geometry
    verdict: Verdict
    datasets: list[DatasetFacts]
    rejects: list[Reject]
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
        """Everything but the pictures, as plain values."""
        return {
            "meta": self.meta,
            "verdict": asdict(self.verdict),
            "counts": {
                facts.name: {"rows": facts.rows, "used": facts.used, "rejected": sum(facts.rejected.values())}
                for facts in self.datasets
            },
            "rejected": [asdict(line) for line in self.rejects],
            "warnings": [asdict(warning) for warning in self.warnings],
            "quality": {
                "checked": self.checked,
                "counts": dict(Counter(line.rule for line in self.flagged).most_common()),
                "hits": [asdict(line) for line in self.flagged],
            },
            "packing": None if self.packing is None else asdict(self.packing),
            "datasets": [asdict(facts) for facts in self.datasets],
            "examples": {
                facts.name: [example.numbers() for example in examples]
                for facts, examples in zip(self.datasets, self.examples, strict=True)
            },
            "geometry": asdict(self.geometry),
            "data": asdict(self.config),
        }


def audit_corpus(
    corpus: Corpus,
    config: DataConfig,
    geometry: Geometry,
    *,
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
        rows: of each dataset that are opened; None opens all.
        examples: of each dataset that are shown.
        seed: of mixture, packing and augmentation.
        show: progress bars.
    """
    scan = scan_rows(corpus, show=show)
    opened = open_rows(corpus, rows=rows, examples=examples, seed=seed, show=show)
    broken = {**scan.broken, **opened.broken}
    rejects = _by_dataset(corpus, broken)
    facts = dataset_facts(corpus, mixture_of(corpus, config), scan.scans, opened, rejects)
    subjects = _subjects(corpus, config, geometry, facts, scan, rejects, broken)
    warnings = [concern for subject in subjects for concern in concerns_of(subject)]
    every_reject = [line for lines in rejects for line in lines]
    return Audit(
        meta=config.meta,
        config=config,
        geometry=geometry,
        verdict=_verdict(every_reject, sum(map(len, corpus.indexes)), len(broken), config.reject_limit, warnings),
        datasets=facts,
        rejects=every_reject,
        warnings=warnings,
        flagged=scan.flagged,
        checked=scan.checked,
        packing=forecast(corpus, config, seed, cost=geometry.cost, show=show),
        examples=opened.examples,
    )


def _by_dataset(corpus: Corpus, broken: dict[int, Reject]) -> list[list[Reject]]:
    """All rejects of each dataset, by line."""
    rejects = [list(index.rejects) for index in corpus.indexes]
    for row, line in broken.items():
        rejects[corpus.dataset_of(row)].append(line)
    return [sorted(lines, key=lambda line: line.line) for lines in rejects]


def _subjects(
    corpus: Corpus,
    config: DataConfig,
    geometry: Geometry,
    facts: list[DatasetFacts],
    scan: ScanResult,
    rejects: list[list[Reject]],
    broken: dict[int, Reject],
) -> list[Subject]:
    return [
        Subject(
            spec=spec,
            index=corpus.indexes[number],
            facts=facts[number],
            scan=scan.scans[number],
            rejects=rejects[number],
            broken=sum(line.dataset == spec.name for line in broken.values()),
            flagged=[line for line in scan.flagged if line.dataset == spec.name],
            config=config,
            tokens_per_tile=geometry.tokens_per_tile,
            alone=len(corpus.specs) == 1,
        )
        for number, spec in enumerate(corpus.specs)
    ]


def _verdict(rejects: list[Reject], indexed: int, broken: int, limit: float, warnings: list[Concern]) -> Verdict:
    counted = sum(line.counted for line in rejects)
    # As training counts: rows set aside on purpose are no part of it.
    rows = indexed - broken + counted
    share = f"{counted:,} of {rows:,} rows cannot be used ({counted / max(rows, 1):.1%})"
    if counted > limit * rows:
        return Verdict(OVER_LIMIT, f"{share}, more than data.reject_limit={limit:.1%}: training would stop")
    if warnings:
        return Verdict(WARNINGS, f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}; {share}")
    return Verdict(OK, f"no warning; {share}")
