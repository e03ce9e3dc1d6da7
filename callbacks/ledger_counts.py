"""Rows that were left out, by reason, beside the curves of training."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.data.ledger import Ledger
from ivl_lightning.data.ranks import gathered
from ivl_lightning.stages.logged_numbers import log_numbers
from ivl_lightning.structures import PackedBatch, PreferenceBatch


class LedgerCounts(Callback):
    """Logs `ledger/REASON`: rows left out so far, over all ranks; nothing where none were.

    The ranks ask each other behind a step that has lost a row, which all of them know, and never else.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._own: Counter[str] = Counter()
        self._counted = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was measured, and what broke before the run was resumed, all ranks have counted."""
        self._note(datamodule_of(trainer).ledger)
        self._counts = self._own.copy()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PackedBatch | PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """Log behind a step."""
        if batch.planned.micro_step + 1 < batch.planned.num_micro_steps:
            return
        ledger = datamodule_of(trainer).ledger
        if ledger.counted != self._counted:
            new = ledger.counts - self._own
            self._counts.update(sum(gathered(new, trainer.world_size), Counter()))
            self._note(ledger)
        log_numbers(pl_module, {f"ledger/{reason}": count for reason, count in self._counts.items()})

    def _note(self, ledger: Ledger) -> None:
        self._own, self._counted = ledger.counts.copy(), ledger.counted
