"""How full the packs are, how fast they pass and what ranks wait for: the proof that packing is on."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ivl_lightning.callbacks.step_clock import StepClock
from ivl_lightning.data.datamodule import DynamicPackingDataModule, datamodule_of
from ivl_lightning.stages.logged_numbers import log_numbers
from ivl_lightning.structures import PackedBatch


class PackingStats(StepClock):
    """Logs, per optimizer step and over all ranks, fill of tokens and tiles, samples, rates, waiting and rejects.

    Metrics: `data/fill_tokens` and `data/fill_tiles` (shares of the caps), `data/samples` of the step,
    `data/samples_per_pack`, `data/tokens_per_s`, `data/tiles_per_s`, `data/idle` (modeled share of time that ranks wait
    for the slowest), `data/wait` (share of time that ranks waited for their loaders), `data/rejected` (rows left out so
    far), and, since the run began, `data/tokens/NAME` and `data/tiles/NAME` of each dataset.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step: Tensor | None = None
        self._totals: dict[str, list[float]] = {}
        self._waited = 0.0

    @property
    def tokens(self) -> int:
        """Tokens trained so far, over all ranks."""
        return int(sum(tokens for tokens, _ in self._totals.values()))

    def state_dict(self) -> dict[str, Any]:
        """Tokens and tiles of each dataset so far."""
        return {"totals": self._totals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self._totals = state_dict["totals"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Count a micro-batch; log at the end of a step."""
        datamodule, planned = datamodule_of(trainer), batch.planned
        counts = _counts(batch, len(datamodule.mixture_names))
        self._step = counts if self._step is None else self._step + counts
        if planned.micro_step + 1 < planned.num_micro_steps:
            return
        # A loader counts anew with each epoch.
        waited = datamodule.waited - self._waited if datamodule.waited >= self._waited else datamodule.waited
        self._waited = datamodule.waited
        own = torch.cat([torch.tensor([waited]), self._step]).to(pl_module.device)
        sums = trainer.strategy.reduce(own, reduce_op="sum").tolist()
        log_numbers(pl_module, self._metrics(sums, datamodule, batch, trainer.world_size))
        self._step = None

    def _metrics(
        self, sums: list[float], datamodule: DynamicPackingDataModule, batch: PackedBatch, world_size: int
    ) -> dict[str, float]:
        waited, *by_dataset = sums
        samples, tokens, tiles = (sum(by_dataset[start::3]) for start in range(3))
        config, packs, seconds = datamodule.config, batch.planned.packs_per_step, self.lap()
        metrics = {
            "data/fill_tokens": tokens / (packs * config.max_tokens),
            "data/fill_tiles": tiles / max(packs * config.max_pack_tiles, 1.0),
            "data/samples": samples,
            "data/samples_per_pack": samples / packs,
            "data/tokens_per_s": tokens / seconds,
            "data/tiles_per_s": tiles / seconds,
            "data/idle": batch.planned.idle,
            "data/wait": min(waited / (seconds * world_size), 1.0),
            "data/rejected": float(datamodule.ledger.counted),
        }
        for number, name in enumerate(datamodule.mixture_names):
            total = self._totals.setdefault(name, [0.0, 0.0])
            total[0] += by_dataset[3 * number + 1]
            total[1] += by_dataset[3 * number + 2]
            metrics[f"data/tokens/{name}"], metrics[f"data/tiles/{name}"] = total
        return metrics


def _counts(batch: PackedBatch, datasets: int) -> Tensor:
    """Samples, tokens and tiles of each dataset in a micro-batch, `[datasets * 3]`."""
    counts = torch.zeros(datasets, 3)
    lengths = batch.cu_seqlens.diff().tolist()
    # strict=False: an empty micro-batch has one document of filler, which is no sample.
    for dataset, length, tiles in zip(batch.sample_datasets, lengths, batch.sample_tiles, strict=False):
        counts[dataset] += torch.tensor([1.0, length, tiles])
    return counts.flatten()
