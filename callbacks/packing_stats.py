"""How full the packs are and how fast they pass: the proof that packing is on."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.structures import PackedBatch


class PackingStats(Callback):
    """Logs, per optimizer step and over all ranks, fill of tokens and tiles, samples, rates and rejects.

    Metrics: `data/fill_tokens` and `data/fill_tiles` (shares of the caps), `data/samples`, `data/tokens_per_s`,
    `data/tiles_per_s`, `data/rejected` (rows left out so far, on this rank).
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Count a micro-batch; log at the end of a step."""
        planned = batch.planned
        self._sums += torch.tensor([planned.pack.tokens, planned.pack.tiles, len(batch.sample_ids), 1.0])
        if planned.micro_step + 1 < planned.num_micro_steps:
            return
        sums = trainer.strategy.reduce(self._sums.float().to(pl_module.device), reduce_op="sum").tolist()
        self._log(trainer, pl_module, *sums)
        self._sums.zero_()
        self._since = time.monotonic()

    def _log(
        self, trainer: L.Trainer, module: L.LightningModule, tokens: float, tiles: float, samples: float, packs: float
    ) -> None:
        datamodule = datamodule_of(trainer)
        config, seconds = datamodule.config, time.monotonic() - self._since
        module.log_dict(
            {
                "data/fill_tokens": tokens / (packs * config.max_tokens),
                "data/fill_tiles": tiles / max(packs * config.max_pack_tiles, 1.0),
                "data/samples": samples,
                "data/tokens_per_s": tokens / seconds,
                "data/tiles_per_s": tiles / seconds,
                "data/rejected": float(datamodule.ledger.counted),
            },
            batch_size=1,
        )
