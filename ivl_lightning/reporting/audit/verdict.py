"""The verdict: how many rows cannot be used, of those looked at and of all, against the limit of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ivl_lightning.reporting.audit.findings import Verdict

OK, WARNINGS, OVER_LIMIT = "ok", "warnings", "over_limit"
_NAMED = 3
"""Datasets that the sentence names."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Rows of a dataset as the limit of a run counts them.

    Attributes:
        name: of the dataset.
        rows: all but those set aside on purpose.
        rejected: surely of no use, as far as rows were opened.
        uncertain: over a cap by approximate token counts.
        usable: rows that were measured, and so could be opened.
        opened: those of them that were.
        broken: those of the opened ones that cannot be used.
    """

    name: str
    rows: int
    rejected: int
    uncertain: int = 0
    usable: int = 0
    opened: int = 0
    broken: int = 0

    @property
    def estimated(self) -> float:
        """Rejected rows if those that were not opened break as often as those that were.

        Of 2,000 usable rows 30 were opened and 14 of these are broken: 14 + 14 / 30 * 1,970 = 933.3.
        """
        share = self.broken / self.opened if self.opened else 0.0
        return self.rejected + share * (self.usable - self.opened)


def verdict(tallies: Sequence[Tally], limit: float, warnings: int) -> Verdict:
    """The verdict on all datasets.

    Args:
        tallies: of the datasets, those of validation included, whose rejects count in training too.
        limit: share of rows that may be rejected.
        warnings: how many there are.
    """
    rows, rejected = sum(tally.rows for tally in tallies), sum(tally.rejected for tally in tallies)
    uncertain, estimated = sum(tally.uncertain for tally in tallies), sum(tally.estimated for tally in tallies)
    share = f"{rejected:,} of {rows:,} rows cannot be used ({rejected / max(rows, 1):.1%})"
    if round(estimated) > rejected:
        share = (
            f"about {estimated:,.0f} of {rows:,} rows cannot be used ({estimated / max(rows, 1):.1%}), "
            f"estimated from the rows that were decoded ({rejected:,} are known)"
        )
    rest = _uncertain(uncertain) + _decoded(tallies)
    if estimated > limit * rows:
        state = OVER_LIMIT
        sentence = f"{share}, more than data.reject_limit={limit:.1%}: training would stop{rest}"
    else:
        state = WARNINGS if warnings else OK
        count = "no warning" if not warnings else f"{warnings} warning{'s' if warnings > 1 else ''}"
        sentence = f"{count}; {share}{rest}"
    return Verdict(state, sentence, rows, rejected, round(estimated), uncertain)


def _uncertain(rows: int) -> str:
    if not rows:
        return ""
    return f"; {rows:,} more are over_length by approximate tokens, which is not certain: give model.tokenizer"


def _decoded(tallies: Sequence[Tally]) -> str:
    """How many rows were decoded, where not all were."""
    parts = [tally for tally in tallies if tally.opened < tally.usable]
    if not parts:
        return "; every usable row decoded" if any(tally.usable for tally in tallies) else ""
    named = [f"{tally.opened:,} of {tally.usable:,} rows of {tally.name}" for tally in parts[:_NAMED]]
    if len(parts) > _NAMED:
        rest = parts[_NAMED:]
        opened, usable = sum(tally.opened for tally in rest), sum(tally.usable for tally in rest)
        named.append(f"{opened:,} of {usable:,} rows of {len(rest)} other datasets")
    return f"; {', '.join(named)} decoded"
