"""The audit as one page that needs no other file. Rows are strangers' text: the template escapes all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from ivl_lightning.reporting.audit.audit import Audit
from ivl_lightning.reporting.audit.figures import histogram_figure
from ivl_lightning.reporting.audit.findings import DatasetFacts, Forecast
from ivl_lightning.reporting.audit.statistics import MEASURES
from ivl_lightning.reporting.pages import render_page
from ivl_lightning.reporting.table import percent

MOST_LINES = 500
"""Rows of each reason or rule on the page, so that a frequent one hides none; all of them are in the JSON file."""
Line = TypeVar("Line")
_TEMPLATE = "audit.html.jinja"

DATASET_COLUMNS = (
    "dataset",
    "rows",
    "used",
    "rejected",
    "opened",
    "repeat_time",
    "samples",
    "of samples",
    "of tokens",
    "of tiles",
)
SPREAD_COLUMNS = ("", "total", "smallest", "median", "mean", "95 %", "largest")


def render(audit: Audit, command: str, versions: dict[str, str]) -> str:
    """The page as text.

    Args:
        audit: what was found.
        command: that asked for it.
        versions: of what made it.
    """
    validation = [] if audit.validation is None else audit.validation.rejects
    rejects = [*audit.rejects, *validation]
    return render_page(
        _TEMPLATE,
        audit=audit,
        headline=_headline(audit),
        dataset_columns=DATASET_COLUMNS,
        dataset_rows=[dataset_row(facts) for facts in audit.datasets],
        datasets=[_dataset(facts, examples) for facts, examples in zip(audit.datasets, audit.examples, strict=True)],
        spread_columns=SPREAD_COLUMNS,
        packing_rows=[] if audit.packing is None else packing_rows(audit.packing),
        rejects=[*_first(audit.rejects, "reason", False), *_first(validation, "reason", True)],
        num_rejects=len(rejects),
        reject_reasons=Counter(line.reason for line in rejects).most_common(),
        most_lines=MOST_LINES,
        flagged=[line for line, _ in _first(audit.flagged, "rule", False)],
        flagged_rules=Counter(line.rule for line in audit.flagged).most_common(),
        command=command,
        environment=versions,
    )


def _first(lines: Sequence[Line], group: str, mark: bool) -> list[tuple[Line, bool]]:
    """The first lines of each reason or rule, in order, each with a mark."""
    seen: Counter[str] = Counter()
    shown = []
    for line in lines:
        name = getattr(line, group)
        seen[name] += 1
        if seen[name] <= MOST_LINES:
            shown.append((line, mark))
    return shown


def _headline(audit: Audit) -> list[tuple[str, str]]:
    rows, used = sum(facts.rows for facts in audit.datasets), sum(facts.used for facts in audit.datasets)
    return [
        (f"{used:,} of {rows:,}", "rows can be used"),
        (f"{len(audit.rejects):,}", "rows rejected"),
        (f"{len(audit.warnings):,}", "warnings"),
        (f"{len({(line.dataset, line.line) for line in audit.flagged}):,}", "rows flagged by quality rules"),
        (percent(None if audit.packing is None else audit.packing.efficiency), "packing efficiency"),
    ]


def dataset_row(facts: DatasetFacts) -> list[str]:
    """A dataset's row of the overview."""
    rejected = f"{sum(facts.rejected.values()):,}"
    return [
        facts.name,
        f"{facts.rows:,}",
        f"{facts.used:,}",
        f"{rejected} ({facts.set_aside:,} set aside)" if facts.set_aside else rejected,
        f"{facts.opened:,}",
        f"{facts.repeat_time:g}",
        f"{facts.samples:,}",
        *(percent(facts.shares[name]) for name in ("samples", "tokens", "tiles")),
    ]


def _dataset(facts: DatasetFacts, examples: Sequence[object]) -> dict[str, object]:
    return {
        "facts": facts,
        "kinds": ", ".join(f"{count:,} {_KINDS[kind]}" for kind, count in facts.kinds.items()) or "no usable row",
        "reasons": ", ".join(f"{count:,} {reason}" for reason, count in facts.rejected.items()),
        "spread_rows": [[_MEASURES[name], *_spread(facts, name)] for name in MEASURES if name in facts.spreads],
        "figure": histogram_figure(facts),
        "examples": examples,
    }


_KINDS = {"image": "with one picture", "images": "with a list of pictures", "video": "with a video", "text": "of text"}
_MEASURES = {"tokens": "tokens", "tiles": "tiles", "labels": "trained tokens"}


def _spread(facts: DatasetFacts, name: str) -> list[str]:
    spread = facts.spreads[name]
    whole = (spread.total, spread.smallest)
    rest = (f"{spread.median:,.0f}", f"{spread.mean:,.1f}", f"{spread.p95:,.0f}", f"{spread.largest:,}")
    return [*(f"{value:,}" for value in whole), *rest]


def packing_rows(packing: Forecast) -> list[tuple[str, str, str]]:
    """The forecast as name, number and meaning."""
    return [
        ("samples of an epoch", f"{packing.samples:,}", f"{packing.tokens:,} tokens, {packing.tiles:,} tiles"),
        ("packs", f"{packing.packs:,}", f"{packing.lower_bound:,} would hold them if every pack were full"),
        ("efficiency", percent(packing.efficiency), "that lower bound over the planned packs"),
        ("tokens filled", percent(packing.fill_tokens), "of data.max_tokens, mean over packs"),
        ("tiles filled", percent(packing.fill_tiles), "of data.max_pack_tiles, mean over packs"),
        ("samples per pack", f"{packing.samples_per_pack:.1f}", f"{packing.most_samples:,} at most"),
        ("steps of an epoch", f"{packing.steps:,}", f"of data.packs_per_step={packing.packs_per_step:,}"),
        (
            "ranks idle",
            "needs data.packs_per_step" if packing.idle is None else percent(packing.idle),
            "of their time, waiting for the dearest pack of the step: modeled, with one pack of a step for each rank",
        ),
    ]
