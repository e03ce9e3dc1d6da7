"""Settings of the audit, `ivl-audit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ivl_lightning.config.schema import DataConfig, ModelConfig, StageConfig, Strict

DropRule = Literal["repeated_lines", "repeated_ngrams", "sentence_length", "answer_length", "zeros", "duplicate"]
_DROPPED: tuple[DropRule, ...] = ("duplicate", "repeated_ngrams")


@dataclass(kw_only=True)
class AuditConfig(Strict):
    """What is looked at before training, and what is written.

    Attributes:
        output: folder of `audit.html` and `audit.json`.
        data: as in training: the audit measures what the run would measure.
        model: its tokenizer, template and tile geometry; weights are not read.
        stage: what would train, which decides what work costs and so which packs stand side by side.
        rows: rows of each dataset that are opened and decoded, spread by a hash of their content; null opens all.
        examples: rows of each dataset that are shown as the model sees them.
        seed: of the forecast epoch and of the shown augmentation.
        drop: exclusion list to write for `data.exclude`; null writes none.
        drop_rules: quality rules whose rows go on that list, by default those that are hardly ever wrong; null takes
            all.
        run_dir: run folder that groups such as `model=miniature` refer to.
        progress_bar: show one.
    """

    output: str
    data: DataConfig
    model: ModelConfig
    stage: StageConfig
    rows: int | None = 200
    examples: int = 4
    seed: int = 0
    drop: str | None = None
    drop_rules: list[DropRule] | None = field(default_factory=lambda: list(_DROPPED))
    run_dir: str = "runs/audit"
    progress_bar: bool = True
