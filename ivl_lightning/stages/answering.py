"""A stage that answers questions: validation rows, and the same rows once more at each tile limit."""

from __future__ import annotations

from typing import Any

import torch
from rich import print as rich_print
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ivl_lightning.config.schema import EvalConfig, Metric
from ivl_lightning.data.annotations import DatasetSpec
from ivl_lightning.data.datamodule import DynamicPackingDataModule, datamodule_of
from ivl_lightning.inference.answers import decode_answers
from ivl_lightning.models.parts import text_config
from ivl_lightning.models.shard import reshard
from ivl_lightning.stages.answer_scores import SCORE, AnswerScores, Number
from ivl_lightning.stages.network import ModelSource, NetworkStage
from ivl_lightning.structures import Answer, PromptBatch

_CURVE_NUMBERS: tuple[Number, ...] = ("repeats", "cut_off", "answer_tokens", "prompt_tokens", "tiles")


class AnsweringStage(NetworkStage):
    """Generates answers and scores them, each dataset by its metric.

    `trainer.test` answers the rows of validation at each of the data module's tile limits.

    Args:
        model: see `NetworkStage`.
        generation_tokens: most tokens of an answer.
        evaluation: metrics of the datasets.
        **network: see `NetworkStage`.

    Attributes:
        tile_scores: of each tile limit what `AnswerScores.compute` gave; empty before a test.
    """

    def __init__(
        self, model: ModelSource, *, generation_tokens: int = 32, evaluation: EvalConfig | None = None, **network: Any
    ) -> None:
        super().__init__(model, **network)
        self.generation_tokens = generation_tokens
        self.evaluation = evaluation or EvalConfig()
        self.val_scores = AnswerScores()
        self.tile_scores: dict[int, dict[str, float]] = {}
        self._at_limits: list[AnswerScores] = []

    def setup(self, stage: str) -> None:
        """One score per dataset whose validation rows are answered, on every rank."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, DynamicPackingDataModule):
            return
        answered = datamodule.answered_datasets
        self.tile_scores = {}
        for spec in answered:
            self.val_scores.add(spec.name, self.metric_of(spec))
        unknown = set(self.evaluation.metrics or {}).difference(spec.name for spec in answered)
        if unknown and stage == "fit" and self.trainer.is_global_zero:
            names = ", ".join(spec.name for spec in answered) or "none"
            rich_print(f"[yellow]eval.metrics names {', '.join(sorted(unknown))}[/yellow], but answered are: {names}")

    def metric_of(self, dataset: DatasetSpec) -> Metric:
        """By which a dataset's answers are scored: the settings' word, else its meta.json's, else the common one."""
        return (self.evaluation.metrics or {}).get(dataset.name) or dataset.metric or self.evaluation.metric

    @property
    def prompt_room(self) -> int | None:
        """Tokens that the model's context has for a prompt; None where the configuration names no limit."""
        context = getattr(text_config(self.internvl.config), "max_position_embeddings", None)
        return None if context is None else context - self.generation_tokens

    def answer(self, batch: PromptBatch) -> list[Answer]:
        """Answers to the counted questions of a batch; sharded ranks must call it equally often."""
        assert self.root is not None
        datamodule = datamodule_of(self.trainer)
        # Compiled blocks would be compiled anew for the cache, whose length changes with each token.
        with torch.compiler.set_stance("force_eager" if self.sharding.compile_blocks else "default"):
            tokens = self.root.generate(
                batch,
                max_new_tokens=self.generation_tokens,
                pad_token_id=datamodule.filler_id,
                eos_token_id=datamodule.stop_ids,
                synced_gpus=isinstance(self.root, FSDPModule),
            )
        return decode_answers(tokens, batch, datamodule.tokenizer, datamodule.stop_ids)

    # -- validation -----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Count anew. Here and not at the end: `validate` and `fit` keep tensors of different kinds."""
        self.val_scores.reset()

    def _answer_prompts(self, batch: PromptBatch) -> dict[str, list[Answer]]:
        """Answer questions and count what is right; callbacks get the answers."""
        answers = self.answer(batch)
        self.val_scores.update(answers)
        return {"answers": answers}

    def on_validation_epoch_end(self) -> None:
        """Log each dataset's score, and means."""
        self._log_scores("val", self.val_scores.compute())

    def on_validation_end(self) -> None:
        """Leave nothing gathered: whoever reads parameters next shall find the shares, in the type they are kept in."""
        if self.root is not None:
            reshard(self.root)

    def _log_scores(self, prefix: str, scores: dict[str, Tensor]) -> None:
        # The metrics have already added up the ranks; averaging equal numbers once more tells Lightning so.
        for name, value in scores.items():
            self.log(f"{prefix}/{name}", value, prog_bar=f"{prefix}/{name}" == f"val/{SCORE}", sync_dist=True)

    # -- tile limits ----------------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        """Scores of each tile limit; the loaders know by now which datasets have a row that fits."""
        datamodule = datamodule_of(self.trainer)
        self._at_limits = [AnswerScores(_CURVE_NUMBERS).to(self.device) for _ in datamodule.tile_limits]
        for spec in datamodule.datasets_at_limits:
            for scores in self._at_limits:
                scores.add(spec.name, self.metric_of(spec))

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Answer]]:
        """Answer questions at a tile limit; there is a loader for each."""
        answers = self.answer(batch)
        self._at_limits[dataloader_idx].update(answers)
        return {"answers": answers}

    def on_test_epoch_end(self) -> None:
        """Log the scores and costs of each limit."""
        self.log("step", float(self.trainer.global_step), sync_dist=True)
        for limit, scores in zip(datamodule_of(self.trainer).tile_limits, self._at_limits, strict=True):
            computed = scores.compute()
            self._log_scores(f"eval/tiles_{limit}", computed)
            self.tile_scores[limit] = {name: float(value) for name, value in computed.items()}

    def on_test_end(self) -> None:
        """As behind a validation."""
        self.on_validation_end()
