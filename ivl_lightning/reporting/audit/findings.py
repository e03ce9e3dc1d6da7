"""What an audit finds, as plain records: the page shows them and `audit.json` holds them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ivl_lightning.structures import Record, Reject


@dataclass(frozen=True, slots=True)
class Concern:
    """Something a person should decide on before training.

    Attributes:
        rule: a short name.
        dataset: it concerns.
        rows: how many rows of it; 0 where it concerns the dataset's settings alone.
        message: what is so.
        advice: what to do.
        example: a row, where there is one.
    """

    rule: str
    dataset: str
    rows: int
    message: str
    advice: str
    example: str = ""


@dataclass(slots=True)
class Remark:
    """Rows of one dataset that share a property, counted, and the first of them."""

    rows: int = 0
    example: str = ""

    def add(self, place: str) -> None:
        """Count a row."""
        if self.rows == 0:
            self.example = place
        self.rows += 1


@dataclass(slots=True)
class Scan:
    """What reading every row of a dataset brings to light.

    Attributes:
        kinds: rows with one image (`image`), several (`images`), a `video`, or `text` alone. Rejected rows count too,
            where their media field can be read; rows set aside on purpose do not.
        remarks: property -> rows that have it.
        unchecked: pictures whose headers were not looked at, since each would have to be fetched.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    remarks: dict[str, Remark] = field(default_factory=dict)
    unchecked: int = 0

    def remark(self, name: str, place: str) -> None:
        """Note that a row has a property."""
        self.remarks.setdefault(name, Remark()).add(place)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Rows between two edges: `counts[i]` from `edges[i]` up to `edges[i + 1]`; `log` where edges grow by a factor."""

    edges: list[float]
    counts: list[int]
    log: bool


@dataclass(frozen=True, slots=True)
class Spread:
    """How a number is spread over rows."""

    total: int
    smallest: int
    median: float
    mean: float
    p95: float
    largest: int
    histogram: Histogram


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """A dataset in numbers.

    Attributes:
        name, annotation, root, data_augment, max_dynamic_patch, repeat_time: as in the meta file.
        rows: of the annotation file.
        used: rows that can be used, as far as they were opened.
        rejected: rows that cannot, by reason.
        set_aside: rejected rows that do not count against the limit.
        opened: rows whose pictures were decoded.
        broken: opened rows that cannot be used.
        held_back: usable rows that `data.val_rows` keeps for validation.
        kinds: rows by kind of media; see `Scan`.
        unchecked: pictures whose headers were not looked at.
        samples: of an epoch.
        shares: this dataset's part of the epoch's `samples`, `tokens` and `tiles`.
        spreads: of `tokens`, `tiles` and `labels` over the rows; empty without a usable row.
    """

    name: str
    annotation: str
    root: str
    data_augment: bool
    max_dynamic_patch: int | None
    repeat_time: float
    rows: int
    used: int
    rejected: dict[str, int]
    set_aside: int
    opened: int
    broken: int
    held_back: int
    kinds: dict[str, int]
    unchecked: int
    samples: int
    shares: dict[str, float]
    spreads: dict[str, Spread]


@dataclass(frozen=True, slots=True)
class Forecast:
    """An epoch's packs.

    Attributes:
        samples, tokens, tiles: of the epoch.
        packs: planned.
        lower_bound: packs that no planner can go below: tokens and tiles over their caps, the larger of both.
        efficiency: `lower_bound / packs`.
        fill_tokens, fill_tiles: mean share of the caps that packs fill.
        samples_per_pack: mean.
        most_samples: of a pack.
        packs_per_step: of the settings.
        steps: optimizer steps of the epoch.
        idle: modeled share of time that ranks wait for the dearest pack of their step, with a rank for each pack; None
            for a single pack a step, where there is nobody to wait for.
    """

    samples: int
    tokens: int
    tiles: int
    packs: int
    lower_bound: int
    efficiency: float
    fill_tokens: float
    fill_tiles: float
    samples_per_pack: float
    most_samples: int
    packs_per_step: int
    steps: int
    idle: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole in a word.

    Attributes:
        state: `ok`, `warnings` or `over_limit`.
        sentence: the same for a person.
        rows: that the limit refers to.
        rejected: rows known to be useless, as far as the audit can be certain.
        estimated: the same, with the rows that were not opened taken to break as often as those that were.
        uncertain: rows over a cap by approximate token counts alone.
    """

    state: str
    sentence: str
    rows: int
    rejected: int
    estimated: int
    uncertain: int


def place(record: Record) -> str:
    """A row's line and id, for people."""
    return f"line {record.line}" if record.id is None else f"line {record.line} (id {record.id})"


def reasons(rejects: list[Reject]) -> dict[str, int]:
    """Reason -> rows, most frequent first."""
    return dict(Counter(line.reason for line in rejects).most_common())
