"""A vocabulary that grows: rows for tokens that a language model has not been trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from ivl_lightning.checkpoints.source import TensorSource, read_rows
from ivl_lightning.models.checkpoint import EMBEDDINGS, HEAD


class GrownVocabulary:
    """Tensors of a network with more token rows; the old rows stay.

    Source: official `internvl_chat_finetune.py`: new input rows keep the library's random start, new output rows are
    the mean of the old ones, so that a new token begins as likely as an average one.

    Args:
        source: with native names.
        rows: wanted in all.
        std: spread of new input rows; the library's `initializer_range`.
        seed: of new input rows.
    """

    def __init__(self, source: TensorSource, rows: int, *, std: float, seed: int) -> None:
        self._source = source
        self._rows, self._std, self._seed = rows, std, seed

    def names(self) -> list[str]:
        """See `TensorSource`."""
        return self._source.names()

    def meta(self, name: str) -> Tensor:
        """See `TensorSource`."""
        old = self._source.meta(name)
        return old.new_empty(self._rows, *old.shape[1:]) if name in (EMBEDDINGS, HEAD) else old

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        old = self._source.read(name)
        if name not in (EMBEDDINGS, HEAD):
            return old
        missing = self._rows - len(old)
        return torch.cat([old, self._random(old, missing) if name == EMBEDDINGS else _means(old, missing)])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `RowSource`; new rows follow from all of the old ones."""
        if name in (EMBEDDINGS, HEAD) and stop > self._source.meta(name).shape[0]:
            return self.read(name)[start:stop]
        return read_rows(self._source, name, start, stop)

    def where(self, name: str) -> str:
        """See `TensorSource`."""
        return self._source.where(name)

    def _random(self, old: Tensor, rows: int) -> Tensor:
        # Not from the global generator: every rank must draw the same, whatever it has drawn before.
        generator = torch.Generator().manual_seed(self._seed)
        return torch.empty(rows, *old.shape[1:]).normal_(std=self._std, generator=generator).to(old.dtype)


def _means(old: Tensor, rows: int) -> Tensor:
    return old.mean(dim=0, keepdim=True).expand(rows, -1)
