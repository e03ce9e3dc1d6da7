"""The LightningDataModule: index, plan, loaders, ledger, and the position a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.annotations import DatasetSpec
from ivl_lightning.data.corpus import Corpus, hold_back, read_corpus
from ivl_lightning.data.dataset import PackDataset, PromptDataset, generation_rows, prompt_groups
from ivl_lightning.data.encoding import EncoderFactory, RowEncoder, encoder_factory
from ivl_lightning.data.exclusion import check_exclusions
from ivl_lightning.data.expected_rows import check_expected_rows
from ivl_lightning.data.horizon import Horizon
from ivl_lightning.data.layout import tokens_per_tile
from ivl_lightning.data.ledger import Ledger
from ivl_lightning.data.loader_signals import leave_signals_to_parent
from ivl_lightning.data.plan import DEFAULT_COST, Cost, accumulation, fixed_plan
from ivl_lightning.data.ranks import check_agreement, gathered
from ivl_lightning.data.sampler import FixedSampler, PlannedLoader, StreamSampler, Waiting, whole_item
from ivl_lightning.data.stream import TrainingStream, plan_settings
from ivl_lightning.data.templates import stop_ids
from ivl_lightning.data.tile_limits import encoded_by, rows_that_fit
from ivl_lightning.data.truths import check_truths
from ivl_lightning.models.tokenizer import filler_id
from ivl_lightning.structures import PackedBatch, PreferenceBatch, PromptBatch, Reject

LEDGER_NAME = "ledger.jsonl"


class DynamicPackingDataModule(L.LightningDataModule):
    """Packs of images, videos and text from official meta.json files.

    Training batches are `PackedBatch`; validation has two loaders, packs for the loss and `PromptBatch` for answers.
    The datamodule sets the trainer's accumulation: packs_per_step / data-parallel ranks.

    Args:
        config: paths, caps, tiling, validation.
        tokenizer: with the nine special tokens.
        template: chat template.
        seed: of order, frames and augmentation.
        patch_size: of the vision tower; with `downsample_ratio` it decides the tokens of a tile.
        downsample_ratio: of the pixel unshuffle.
        cost: the model's work per token, per squared document length, per tile (`models.cost.forward_cost`); packs of
            like cost run side by side.
        tile_limits: in a test the answered rows are answered at each of these (`eval.max_tiles`).
        look_again: look again at rows of a cached index whose media could not be read. Not where a run goes on from a
            checkpoint: its epoch ends with the rows it began with.

    Attributes:
        rows_at_limits: rows of `answer_corpus` that a test answers at every tile limit.
        left_out_at_limits: how many others there are, by reason.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "internvl2_5",
        seed: int = 0,
        patch_size: int = 14,
        downsample_ratio: float = 0.5,
        cost: Cost = DEFAULT_COST,
        tile_limits: Sequence[int] = (),
        look_again: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.template = template
        self.seed = seed
        self.tile_tokens = tokens_per_tile(config.tile_size, patch_size, downsample_ratio)
        self.cost = cost
        self.tile_limits = tuple(sorted(tile_limits))
        self.rows_at_limits: list[int] = []
        self.left_out_at_limits: dict[str, int] = {}
        self.look_again = look_again
        self.reduction = "square"
        self.ledger = Ledger(None)
        self._num_rows = 0
        self.train_corpus: Corpus | None = None
        self.val_corpus: Corpus | None = None
        self._stream: TrainingStream | None = None
        self._resume_from: dict[str, Any] | None = None
        self._pass_over: int | None = None
        self._stays = False
        self._loaders: tuple[ref[PlannedLoader], ...] = ()
        self._loader_in_use: PlannedLoader | None = None

    # -- set-up ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Measure once, in one process of a node, so that the others find the index in the cache."""
        if self.config.cache_dir is not None:
            self.read_corpora(progress=True, look_again=self.look_again)

    def setup(self, stage: str) -> None:
        """Read the index, write the ledger, plan.

        Raises:
            ValueError: a wrong meta file, too many rejects, nothing to train on, or ranks that do not divide a step;
                on all ranks where it is raised on one.
        """
        problem = None
        try:
            self._set_up(stage)
        except ValueError as error:
            problem = error
        check_agreement(problem, self._corpora, self._world_size)

    @property
    def _corpora(self) -> tuple[Corpus | None, ...]:
        """What all ranks must see alike."""
        return self.train_corpus, self.val_corpus

    def _set_up(self, stage: str) -> None:
        if self.train_corpus is None:
            self._measure()
            if self.answer_corpus is not None and self._rank == 0:
                check_truths(self.answer_corpus, self.answered_rows)
        if self.trainer is not None:
            self.reduction = getattr(self.trainer.lightning_module, "reduction", self.reduction)
            if stage == "fit":
                self._set_up_trainer(self.trainer)
        if stage == "fit":
            assert self.train_corpus is not None
            settings = plan_settings(
                self.config,
                seed=self.seed,
                reduction=self.reduction,
                cost=self.cost,
                epochs=self._epochs,
                pairs=self.train_corpus.pairs,
            )
            self._stream = TrainingStream(self.train_corpus, self.config, settings)
            # A step that does not fit is refused here, before hours are spent on anything.
            self._stream.check_run(self.trainer.current_epoch if self.trainer is not None else 0, self._max_steps)

    def _measure(self) -> None:
        """Read the rows, list those that cannot be used, hold back those of validation."""
        train, validation = self.read_corpora(progress=self.config.cache_dir is None)
        self._open_ledger([corpus for corpus in (train, validation) if corpus is not None])
        if self.config.val_rows:
            train, held_back = train.split(hold_back(train.column("question"), self.config.val_rows))
            validation = held_back.measured_again(self._encoder(training=False))
            self.ledger.add(validation.rejects, write=self._rank == 0)
            self.ledger.check(self._num_rows, self.config.reject_limit, validation.rejects)
        self.train_corpus, self.val_corpus = train, validation

    def read_corpora(self, *, progress: bool, look_again: bool = False) -> tuple[Corpus, Corpus | None]:
        """Rows of the training and of the validation data, measured or from the cache; see `read_corpus`.

        Raises:
            ValueError: as `read_corpus`.
        """
        train = self._read(self.config.meta, self._encoder(training=True), progress, look_again)
        check_expected_rows(self.config.expected_rows, train.indexes)
        validation = None
        if self.config.val_meta is not None:
            validation = self._read(self.config.val_meta, self._encoder(training=False), progress, look_again)
        indexes = [*train.indexes, *(() if validation is None else validation.indexes)]
        check_exclusions(self.config.exclude, indexes)
        return train, validation

    def read_answers(self, *, progress: bool, look_again: bool = False) -> Corpus | None:
        """Rows that are answered in validation besides those of `read_corpora`; None where there are no others."""
        return None

    def read_conversations(self, meta: str) -> Corpus:
        """Rows of another meta.json, measured as those that validation answers, or from the cache; see `read_corpus`.

        Raises:
            ValueError: as `read_corpus`.
        """
        return self._read(meta, self._factory(RowEncoder, training=False), progress=False, look_again=False)

    def _read(self, meta: str, encoder: EncoderFactory, progress: bool, look_again: bool) -> Corpus:
        return read_corpus(
            meta,
            encoder,
            cache_dir=self._cache_dir,
            progress=progress,
            workers=self.config.index_workers,
            exclude=self.config.exclude,
            look_again=look_again,
        )

    def _open_ledger(self, corpora: Sequence[Corpus]) -> None:
        rejects = [line for corpus in corpora for line in corpus.rejects]
        folder = None if self.trainer is None else Path(self.trainer.default_root_dir)
        self.ledger = Ledger(None if folder is None else folder / LEDGER_NAME)
        # Every rank counts, so that all stop together; the first one writes.
        self.ledger.add(rejects, write=self._rank == 0)
        self._num_rows = sum(map(len, corpora)) + self.ledger.counted
        self.ledger.check(self._num_rows, self.config.reject_limit, rejects)

    def _set_up_trainer(self, trainer: L.Trainer) -> None:
        steps = accumulation(self.config.packs_per_step, self._world_size)
        if trainer.accumulate_grad_batches not in (1, steps):
            raise ValueError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) contradicts "
                f"data.packs_per_step={self.config.packs_per_step} on {self._world_size} ranks, which makes {steps}: "
                "leave it out, it is derived"
            )
        trainer.accumulate_grad_batches = steps
        # Each epoch has a plan of its own, so each has a loader of its own.
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # set by Lightning's connector

    # -- loaders --------------------------------------------------------------------------------------------------

    @property
    def stream(self) -> TrainingStream:
        """Plan and position of training.

        Raises:
            ValueError: before `setup("fit")`.
        """
        if self._stream is None:
            raise ValueError('there is no plan before setup("fit")')
        return self._stream

    def horizon(self) -> Horizon | None:
        """Optimizer steps of the whole run; None for a run without an end."""
        return self.stream.horizon(max_steps=self._max_steps, cache_dir=self._cache_dir)

    @property
    def mixture_names(self) -> tuple[str, ...]:
        """Datasets of the current epoch; a batch's dataset numbers count these."""
        return tuple(share.name for share in self.stream.mixture)

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """This rank's packs of the current epoch, from where a checkpoint stopped.

        Raises:
            ValueError: a checkpoint of mid-epoch does not fit to the data or settings of this run.
        """
        self._take_position()
        count_in = self._cache_dir if self._rank == 0 else None
        packs = partial(self.stream.packs, self._rank, self._world_size, count_in=count_in)
        self.ledger.read_others()
        dataset = self._train_dataset(self.stream.view)
        self._loader_in_use = self._loader(dataset, StreamSampler(packs))
        return self._loader_in_use

    def pass_over(self, steps: int) -> None:
        """Begin so many steps behind the position, and stay there: for running a single step again.

        Call it before the fit. The steps are planned and not read; they may lead into later epochs, whatever Lightning
        counts.
        """
        self._pass_over = steps

    def _take_position(self) -> None:
        """Stand where the next loader begins."""
        resumed, self._resume_from = self._resume_from, None
        if self._stays:
            return
        if resumed is None:
            self.stream.begin(self.trainer.current_epoch if self.trainer else 0)
        else:
            self.stream.resume(resumed)
        if self._pass_over is not None:
            self.stream.advance(self._pass_over)
            self._stays = True

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Packs for the loss on a fixed plan without augmentation, and prompts for generated answers."""
        if not self.has_val_packs:
            return self._prompt_loaders()
        corpus, config = self.val_corpus, self.config
        assert corpus is not None
        packs = fixed_plan(
            corpus.plan_rows,
            max_tokens=config.max_tokens,
            max_tiles=config.max_pack_tiles,
            reduction=self.reduction,
            rank=self._rank,
            world_size=self._world_size,
        )
        return [self._loader(self._val_dataset(corpus), FixedSampler(packs)), *self._prompt_loaders()]

    def _prompt_loaders(self) -> list[DataLoader[Any]]:
        corpus, rows = self.answer_corpus, self.answered_rows
        if corpus is None or not rows:
            return []
        return [self._prompt_loader(corpus, rows, self.config.generation_batch)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Prompts of the answered rows at each tile limit: those rows that can be used at every one."""
        corpus = self.answer_corpus
        if corpus is None or not self.tile_limits:
            return []
        corpora = [encoded_by(corpus, self._encoder_at(limit)) for limit in self.tile_limits]
        # One looks for all: ranks that see different files would wait for each other.
        found = rows_that_fit(corpora, self.answered_rows) if self._rank == 0 else ([], {})
        if self.trainer is not None:
            found = self.trainer.strategy.broadcast(found)
        self.rows_at_limits, self.left_out_at_limits = found
        if not self.rows_at_limits:
            return []
        return [
            self._prompt_loader(limited, self.rows_at_limits, self._batch_at(limit))
            for limited, limit in zip(corpora, self.tile_limits, strict=True)
        ]

    def _encoder_at(self, limit: int) -> EncoderFactory:
        """Of answered rows at a tile limit; a row beyond the caps, or the model's context, is refused."""
        room = None if self.trainer is None else getattr(self.trainer.lightning_module, "prompt_room", None)
        tokens = self.config.max_tokens if room is None else min(self.config.max_tokens, room)
        config = replace(self.config, val_max_tiles=limit, max_tokens=tokens, over_length="reject")
        return self._factory(RowEncoder, training=False, config=config)

    def _batch_at(self, limit: int) -> int:
        """Questions side by side at a tile limit: no more tiles than in validation."""
        size = self.config.generation_batch
        return max(1, min(size, size * (self.config.val_max_tiles + 1) // (limit + 1)))

    def _prompt_loader(self, corpus: Corpus, rows: Sequence[int], size: int) -> PlannedLoader:
        groups = prompt_groups(rows, size=size, rank=self._rank, world_size=self._world_size)
        prompts = PromptDataset(corpus, pad_id=self.filler_id, tile_size=self.config.tile_size)
        return self._loader(prompts, FixedSampler(groups))

    def _train_dataset(self, corpus: Corpus) -> Dataset[Any]:
        options = {**self._dataset_options, "left_out": self.ledger.left_out}
        return PackDataset(corpus, reduction=self.reduction, augmentation_seed=self.seed, **options)

    def _val_dataset(self, corpus: Corpus) -> Dataset[Any]:
        return PackDataset(corpus, reduction=self.reduction, augmentation_seed=None, **self._dataset_options)

    @property
    def _dataset_options(self) -> dict[str, Any]:
        return {"tile_size": self.config.tile_size, "filler_id": self.filler_id}

    def _loader(self, dataset: Any, sampler: FixedSampler | StreamSampler) -> PlannedLoader:
        loader = PlannedLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.config.num_workers,
            collate_fn=whole_item,
            pin_memory=self._feeds_gpu,
            # A loader draws a number when it begins; a resumed run would lack one from the common generator.
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_parent,
        )
        self._loaders = (*(known for known in self._loaders if known() is not None), ref(loader))
        return loader

    def waiting_for(self) -> Waiting | None:
        """What this rank's loaders are waited for, now; None while nobody waits. For other threads."""
        loaders = (known() for known in self._loaders)
        every = (None if loader is None else loader.waiting() for loader in loaders)
        return next((waiting for waiting in every if waiting is not None), None)

    @property
    def waited(self) -> float:
        """Seconds that training has waited for batches of the current epoch, on this rank."""
        return 0.0 if self._loader_in_use is None else self._loader_in_use.waited

    # -- batches, position ----------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch."""
        if not isinstance(batch, (PackedBatch, PreferenceBatch, PromptBatch)):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch.to(device)

    def note_rejects(self, rejects: Sequence[Reject]) -> int:
        """List rows that broke when a batch was made; returns how many were not known before."""
        return self.ledger.add(rejects)

    def note_rejects_elsewhere(self, counted: int) -> None:
        """Count what other ranks have lost in the step, and stop on all ranks where it is too much.

        Raises:
            TooManyRejectsError: more rows are lost than `data.reject_limit` allows.
        """
        self.ledger.count_elsewhere(counted)
        self.ledger.check(self._num_rows, self.config.reject_limit, self.ledger.known)

    def note_trained(self, batch: PackedBatch | PreferenceBatch) -> None:
        """Move the position behind a batch whose gradients are in the weights, or in the step that is being added up.

        Stages call it right behind the optimizer, so that position and weights move together.
        """
        self.stream.position.consume(batch.planned)

    def state_dict(self) -> dict[str, Any]:
        """Position of the plan, what the rest of the epoch depends on, and rows that broke: a few kB."""
        if self._stream is None:
            return {}
        left_out = set().union(*gathered(self.ledger.left_out, self._world_size))
        return {**self.stream.state_dict(), "left_out": sorted(map(list, left_out))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position. Without a plan, as in validation, there is nothing to continue.

        Raises:
            ValueError: the checkpoint is of mid-epoch and was made with another packs_per_step, seed or caps, which
                is another plan.
        """
        if self._stream is None or not state_dict:
            return
        self.stream.check(state_dict)
        self.ledger.leave_out((name, offset, digest) for name, offset, digest in state_dict["left_out"])
        self._resume_from = state_dict

    # -- derived --------------------------------------------------------------------------------------------------

    @property
    def has_val_packs(self) -> bool:
        """Whether validation measures a loss."""
        return self.val_corpus is not None and len(self.val_corpus) > 0

    @property
    def answer_corpus(self) -> Corpus | None:
        """Validation rows that may be answered by generation."""
        return self.val_corpus

    @property
    def answered_datasets(self) -> tuple[DatasetSpec, ...]:
        """Datasets with validation rows that are answered by generation, on any rank; empty without validation."""
        return self._datasets_of(self.answered_rows)

    @property
    def datasets_at_limits(self) -> tuple[DatasetSpec, ...]:
        """Datasets of `rows_at_limits`."""
        return self._datasets_of(self.rows_at_limits)

    def _datasets_of(self, rows: Sequence[int]) -> tuple[DatasetSpec, ...]:
        corpus = self.answer_corpus
        if corpus is None:
            return ()
        return tuple(corpus.specs[number] for number in sorted({corpus.dataset_of(row) for row in rows}))

    @property
    def answered_rows(self) -> tuple[int, ...]:
        """Rows of `answer_corpus` that are answered by generation in each validation, on any rank."""
        corpus = self.answer_corpus
        if corpus is None or len(corpus) == 0:
            return ()
        return tuple(generation_rows(corpus, self.config.generation_rows))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a generated answer: the template's end marker and the tokenizer's end of text."""
        return stop_ids(self.tokenizer, self.template)

    @property
    def _cache_dir(self) -> Path | None:
        return None if self.config.cache_dir is None else Path(self.config.cache_dir).expanduser()

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _feeds_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _epochs(self) -> int | None:
        if self.trainer is None or self.trainer.max_epochs in (None, -1):
            return None
        return self.trainer.max_epochs

    @property
    def _max_steps(self) -> int | None:
        return None if self.trainer is None or self.trainer.max_steps < 0 else self.trainer.max_steps

    @property
    def filler_id(self) -> int:
        """Token that fills what nobody reads: shorter prompts, and an empty micro-batch."""
        return filler_id(self.tokenizer)

    def _encoder(self, *, training: bool) -> EncoderFactory:
        return self._factory(RowEncoder, training=training)

    def _factory(
        self, encoder: type[RowEncoder], *, training: bool, config: DataConfig | None = None
    ) -> EncoderFactory:
        return encoder_factory(
            config or self.config,
            self.tokenizer,
            template=self.template,
            tile_tokens=self.tile_tokens,
            training=training,
            encoder=encoder,
        )


def datamodule_of(trainer: L.Trainer) -> DynamicPackingDataModule:
    """The trainer's data module.

    Raises:
        ValueError: the trainer runs on something else.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, DynamicPackingDataModule):
        raise ValueError(
            f"this stage and its callbacks need a DynamicPackingDataModule, got {type(datamodule).__name__}"
        )
    return datamodule
