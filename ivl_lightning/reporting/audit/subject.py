"""A dataset and all that an audit knows of it: what the checks behind the warnings look at."""

from __future__ import annotations

from dataclasses import dataclass

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.annotations import DatasetSpec
from ivl_lightning.data.index import DatasetIndex
from ivl_lightning.reporting.audit.findings import Concern, DatasetFacts, Remark, Scan
from ivl_lightning.reporting.audit.flagged import Flagged
from ivl_lightning.structures import Reject


@dataclass(frozen=True, slots=True)
class Subject:
    """A dataset and all that is known of it.

    Attributes:
        spec, index: the dataset.
        facts, scan: its numbers.
        rejects: its rows that cannot be used.
        uncertain: those of them that are too long by approximate token counts alone.
        flagged: its rows that break a quality rule.
        config: of the run.
        tokens_per_tile: of the model.
        alone: whether it is the only dataset.
    """

    spec: DatasetSpec
    index: DatasetIndex
    facts: DatasetFacts
    scan: Scan
    rejects: list[Reject]
    uncertain: list[Reject]
    flagged: list[Flagged]
    config: DataConfig
    tokens_per_tile: int
    alone: bool

    def remark(self, name: str) -> Remark:
        """Rows with a property; none where it was never noted."""
        return self.scan.remarks.get(name, Remark())

    @property
    def max_tiles(self) -> int:
        """Grid tiles of a picture at most."""
        return self.config.max_tiles if self.spec.max_dynamic_patch is None else self.spec.max_dynamic_patch

    @property
    def tile_setting(self) -> str:
        """The setting that limits a picture's tiles, with its value."""
        own = self.spec.max_dynamic_patch
        if own is None:
            return f"data.max_tiles is {self.max_tiles} and the dataset has no max_dynamic_patch"
        return f"max_dynamic_patch is {own}"

    @property
    def videos(self) -> int:
        """Rows with a video, those that cannot be used included."""
        return self.scan.kinds["video"]

    @property
    def pictures(self) -> int:
        """Rows with one picture or more, those that cannot be used included."""
        return self.scan.kinds["image"] + self.scan.kinds["images"]

    def concern(self, rule: str, rows: int, message: str, advice: str, example: str = "") -> Concern:
        """A warning about this dataset."""
        return Concern(rule, self.spec.name, rows, message, advice, example)
