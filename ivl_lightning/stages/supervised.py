"""Stages that learn conversations: next-token loss on packs, answers scored in validation.

A stage is this class with another choice of what trains.
"""

from __future__ import annotations

from math import nan
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from ivl_lightning.config.schema import Part
from ivl_lightning.data.collate import documents_of
from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.stages.base import Stage
from ivl_lightning.stages.logged_numbers import log_numbers
from ivl_lightning.stages.network import ModelSource
from ivl_lightning.stages.root import InternVLWithLoss
from ivl_lightning.structures import Answer, PackedBatch, PromptBatch


class SupervisedStage(Stage):
    """Trains on `PackedBatch`, validates on `PackedBatch` (loss) and `PromptBatch` (exact match of answers).

    Args:
        model: see `Stage`.
        loss: the loss head; reweighted (square, step) by default.
        **options: see `Stage`.
    """

    default_trainable: ClassVar[tuple[Part, ...]] = ("vision", "projector", "llm")

    def __init__(self, model: ModelSource, *, loss: NextTokenLoss | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.loss_head = loss or NextTokenLoss()

    @property
    def reduction(self) -> str:
        """Reweighting rule; the data module weighs and plans by it."""
        return self.loss_head.reduction

    def _wrap(self, model: InternVLForConditionalGeneration) -> InternVLWithLoss:
        return InternVLWithLoss(model, self.loss_head, always_run_vision=self._always_run_vision())

    def setup(self, stage: str) -> None:
        """See `Stage.setup`.

        Raises:
            ValueError: data that are preference pairs.
        """
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, PreferenceDataModule):
            raise ValueError(f"{type(self).__name__} learns from conversations: give it a DynamicPackingDataModule")

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of (sum of S) / W."""
        root = cast(InternVLWithLoss, self.root)
        planned = batch.planned
        self._trained = batch
        weighted_sum, token_losses = root(batch)
        self.progress = planned.progress
        self.sample_losses = _sample_losses(token_losses.detach(), batch)
        self._log_step(weighted_sum.detach(), token_losses.detach(), batch)
        return self.loss_head.normalise(weighted_sum, batch.loss_weights, planned.weight_sum, planned.packs_per_step)

    def _log_step(self, weighted_sum: Tensor, token_losses: Tensor, batch: PackedBatch) -> None:
        """With the step's last micro-batch log (sum of S) / W, and each dataset's own."""
        names = datamodule_of(self.trainer).mixture_names
        own = [weighted_sum.float().reshape(1), *_sums_by_dataset(token_losses, batch, len(names))]
        total = self._reduced(torch.cat(own), batch)
        if total is None:
            return
        planned = batch.planned
        self.log("train/loss", total[0] / planned.weight_sum, prog_bar=True, batch_size=1)
        self.log("train/progress", self._share_of_run(planned.progress), batch_size=1)
        losses, weights = total[1:].reshape(2, -1).tolist()
        if len(names) > 1:
            # Of a dataset that is left out Lightning would log the last loss once more.
            by_dataset = zip(names, losses, weights, strict=True)
            known = {f"train/loss/{name}": loss / weight if weight else nan for name, loss, weight in by_dataset}
            log_numbers(self, known)

    def validation_step(
        self, batch: PackedBatch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[Answer]] | None:
        """Loss of a pack, or the answers to a batch of prompts."""
        if isinstance(batch, PromptBatch):
            return self._answer_prompts(batch)
        _, token_losses = cast(InternVLWithLoss, self.root)(batch)
        if len(token_losses):
            self.val_loss.update(token_losses, weight=batch.loss_weights)
        return None


def _sample_losses(token_losses: Tensor, batch: PackedBatch) -> Tensor:
    """Weighted mean loss of each document's labels, `[D]`; 0 for a document without a label."""
    documents, weights = documents_of(batch), batch.loss_weights.float()
    empty = torch.zeros(len(batch.cu_seqlens) - 1, device=weights.device)
    total = empty.index_add(0, documents, weights)
    return empty.index_add(0, documents, token_losses.float() * weights) / total.where(total != 0, 1.0)


def _sums_by_dataset(token_losses: Tensor, batch: PackedBatch, datasets: int) -> tuple[Tensor, Tensor]:
    """Sum of weight x loss and of weights of each dataset, `[datasets]` each."""
    weights = batch.loss_weights.float()
    empty = torch.zeros(datasets, device=weights.device)
    losses = empty.index_add(0, batch.loss_datasets, token_losses.float() * weights)
    return losses, empty.index_add(0, batch.loss_datasets, weights)
