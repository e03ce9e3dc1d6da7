"""Asks a fixed probe set again and again, so that a person sees what a model has learned, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ivl_lightning.callbacks.card_loggers import log_cards
from ivl_lightning.callbacks.probing import probe_answers
from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.data.probe import ProbeSet, probe_set
from ivl_lightning.data.probe_sheets import save_sheets
from ivl_lightning.data.ranks import check_agreement
from ivl_lightning.data.sample_file import SAMPLES_NAME, SampleCard, SheetPlace, append_cards
from ivl_lightning.metrics.scoring import score
from ivl_lightning.stages.base import Stage, stage_of
from ivl_lightning.structures import Answer


class SampleCards(Callback):
    """Appends the answers of a probe set to `samples.jsonl`, and shows them in W&B and TensorBoard where those log.

    It asks before the first step, at each validation, and between them every so many steps. Pictures as the model gets
    them lie beside the file, in `probe/`. Every rank takes part; training is not disturbed.

    Args:
        folder: where file and pictures go.
        rows: of the probe set; 0 asks nothing.
        every_n_steps: steps between two askings besides validations; None asks at the start and with validations only.
        meta: meta.json of the probe set; None takes the first rows that validation answers.

    Raises:
        ValueError: `rows` below 0, or `every_n_steps` below 1.
    """

    def __init__(self, folder: str, rows: int = 12, every_n_steps: int | None = None, meta: str | None = None) -> None:
        if rows < 0 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(f"rows={rows} must be at least 0, and every_n_steps={every_n_steps} at least 1 or None")
        self.folder = Path(folder)
        self.rows, self.every_n_steps, self.meta = rows, every_n_steps, meta
        self._probe: ProbeSet | None = None
        self._sheets: dict[int, list[SheetPlace]] = {}
        self._asked_at: int | None = None
        self._seen = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the rows; the first rank writes their pictures.

        Raises:
            ValueError: wrong rows of the probe set, on all ranks where they are wrong on one.
        """
        if stage not in ("fit", "validate"):
            return
        problem, self._probe, self._asked_at = None, None, None
        try:
            self._choose(trainer)
        except ValueError as error:
            problem = error
        check_agreement(problem, [None if self._probe is None else self._probe.corpus], trainer.world_size)

    def _choose(self, trainer: L.Trainer) -> None:
        self._probe = probe_set(datamodule_of(trainer), rows=self.rows, meta=self.meta)
        if self._probe is not None and trainer.is_global_zero:
            self._sheets = save_sheets(self._probe, self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask before the first step; a run that goes on has been asked."""
        self._seen = trainer.global_step
        if trainer.global_step == 0:
            self._ask(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Ask behind a step whose turn it is."""
        steps = trainer.global_step
        if steps == self._seen:
            return
        self._seen = steps
        if self.every_n_steps is not None and steps % self.every_n_steps == 0:
            self._ask(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask with the weights that were validated."""
        if not trainer.sanity_checking:
            self._ask(trainer, pl_module)

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._probe is None or self._asked_at == trainer.global_step:
            return
        self._asked_at = trainer.global_step
        answered = stage_of(pl_module)
        answers = probe_answers(trainer, answered, self._probe)
        if trainer.is_global_zero:
            cards = [self._card(trainer.global_step, row, answer, answered) for row, answer in answers.items()]
            append_cards(self.folder / SAMPLES_NAME, cards)
            log_cards(trainer.loggers, cards, self.folder)

    def _card(self, step: int, row: int, answer: Answer, stage: Stage) -> SampleCard:
        assert self._probe is not None
        corpus, record = self._probe.corpus, answer.record
        metric = stage.metric_of(corpus.specs[corpus.dataset_of(row)])
        return SampleCard(
            step=step,
            dataset=record.dataset,
            file=record.file,
            line=record.line,
            digest=record.digest,
            question=answer.question,
            expected=answer.expected,
            generated=answer.generated,
            truths=list(answer.truths),
            metric=metric,
            score=score(metric, answer.generated, answer.truths, answer.question),
            tiles=answer.tiles,
            prompt_tokens=answer.prompt_tokens,
            pictures=self._sheets[row],
        )
