"""The probe set: a few fixed rows that are answered again and again while a model learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.dataset import PromptDataset, PromptGroup, generation_rows, prompt_groups
from ivl_lightning.structures import PromptBatch


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """Rows to ask, the same ones whenever they are asked.

    Attributes:
        corpus: they are of it.
        rows: of the corpus, in the order in which they are shown.
        prompts: builds their prompts.
        batch: rows that are answered side by side.
    """

    corpus: Corpus
    rows: tuple[int, ...]
    prompts: PromptDataset
    batch: int

    def groups(self, rank: int, world_size: int) -> list[PromptGroup]:
        """A rank's share; each rank has as many groups, since sharded ranks run every forward together."""
        return prompt_groups(self.rows, size=self.batch, rank=rank, world_size=world_size)

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[tuple[int, ...], PromptBatch]]:
        """The counted rows of each group of a rank, and the prompts of the group.

        Raises:
            RowError: a picture that was measured cannot be decoded.
        """
        for group in self.groups(rank, world_size):
            counted = tuple(row for row, counts in zip(group.rows, group.counted, strict=True) if counts)
            yield counted, self.prompts[group]


def probe_set(datamodule: DynamicPackingDataModule, *, rows: int, meta: str | None = None) -> ProbeSet | None:
    """The probe set of a run; None where there is nothing to ask.

    Args:
        datamodule: set up.
        rows: how many, by turns over the datasets.
        meta: meta.json of conversations; None takes the first of those that validation answers.

    Raises:
        ValueError: the meta file is wrong, or has no row that can be asked.
    """
    if rows == 0:
        return None
    corpus = datamodule.answer_corpus if meta is None else datamodule.read_conversations(meta)
    if corpus is None or len(corpus) == 0:
        if meta is None:
            return None
        raise ValueError(
            f"eval.probe_meta={meta} has no row that can be asked: run ivl-audit data.meta={meta} to see why, or leave "
            "it out"
        )
    config = datamodule.config
    limit = rows if meta is not None or config.generation_rows is None else min(rows, config.generation_rows)
    chosen = tuple(generation_rows(corpus, limit))
    prompts = PromptDataset(corpus, pad_id=datamodule.filler_id, tile_size=config.tile_size)
    return ProbeSet(corpus, chosen, prompts, config.generation_batch) if chosen else None
