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


@dataclass(frozen=True, slots=True)
class Flagged:
    """A row that breaks a quality rule.

    Attributes:
        dataset, file, line, id: the row.
        digest: 16 hexadecimal digits of the row's bytes, as in an exclusion list.
        rule: of `ivl_lightning.data.quality.RULES`.
        text: the place.
        value: what was found.
        limit: what the rule allows.
        message: one sentence for a person.
    """

    dataset: str
    file: str
    line: int
    id: str | None
    digest: str
    rule: str
    text: str
    value: float
    limit: float
    message: str


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
        kinds: rows with one image (`image`), several (`images`), a `video`, or `text` alone.
        remarks: property -> rows that have it.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    remarks: dict[str, Remark] = field(default_factory=dict)

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
        kinds: rows by kind of media.
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
    kinds: dict[str, int]
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
        idle: modeled share of time that ranks wait for the dearest pack of their step, with a rank for each pack.
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
    idle: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole in a word: `ok`, `warnings` or `over_limit`, and a sentence."""

    state: str
    sentence: str


def place(record: Record) -> str:
    """A row's line and id, for people."""
    return f"line {record.line}" if record.id is None else f"line {record.line} (id {record.id})"


def reasons(rejects: list[Reject]) -> dict[str, int]:
    """Reason -> rows, most frequent first."""
    return dict(Counter(line.reason for line in rejects).most_common())
