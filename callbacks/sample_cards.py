"""Keeps answered validation samples, so that a person can look at what the scores mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ivl_lightning.data.annotations import media_of
from ivl_lightning.data.datamodule import DynamicPackingDataModule, datamodule_of
from ivl_lightning.structures import Answer, Record

FILE_NAME = "samples.jsonl"
FRAMES = "frames"


class SampleCards(Callback):
    """Writes the first `limit` answers of each validation to `samples.jsonl`, with pictures and question.

    Of a video the frame in the middle is kept beside the file.

    Args:
        folder: where the file goes.
        limit: answers per validation.
    """

    def __init__(self, folder: str, limit: int = 24) -> None:
        self.path = Path(folder) / FILE_NAME
        self.limit = limit
        self._cards: list[dict[str, Any]] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the cards of the last validation."""
        self._cards = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep answers until there are enough."""
        answers = (outputs or {}).get("answers", [])
        for answer in answers[: self.limit - len(self._cards)]:
            self._cards.append(self._card(answer, trainer))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append the cards of this validation."""
        if not trainer.is_global_zero or not self._cards:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for card in self._cards:
                file.write(json.dumps(card, ensure_ascii=False) + "\n")

    def _card(self, answer: Answer, trainer: L.Trainer) -> dict[str, Any]:
        record = answer.record
        return {
            "step": trainer.global_step,
            "dataset": record.dataset,
            "file": record.file,
            "line": record.line,
            "images": self._pictures(record, datamodule_of(trainer)),
            "question": answer.question,
            "expected": answer.expected,
            "generated": answer.generated,
        }

    def _pictures(self, record: Record, datamodule: DynamicPackingDataModule) -> list[str]:
        media = media_of(record.row)
        if media.kind != "video":
            return [datamodule.media_path(record.dataset, path) for path in media.images]
        frame = self.path.parent / FRAMES / f"{record.digest}.jpg"
        if not frame.is_file():
            frame.parent.mkdir(parents=True, exist_ok=True)
            datamodule.middle_frame(record).save(frame)
        return [str(frame)]
