"""The LightningDataModule of preference pairs: packs, reference log-probabilities, questions to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.encoding import EncoderFactory
from ivl_lightning.data.packing import PackPlanner
from ivl_lightning.data.pair_dataset import PairDataset
from ivl_lightning.data.pair_encoding import PairEncoder
from ivl_lightning.data.plan import dealt_once
from ivl_lightning.data.reference_cache import ReferenceCache, ReferenceLogps, row_keys
from ivl_lightning.data.sampler import FixedSampler
from ivl_lightning.structures import Pack, PreferenceBatch


class PreferenceDataModule(DynamicPackingDataModule):
    """Packs of preference pairs from official meta.json files whose rows have `question`, `chosen` and `rejected`.

    Training and validation batches are `PreferenceBatch`; a second validation loader asks the questions of
    `data.generation_meta` (`PromptBatch`). Arguments as for `DynamicPackingDataModule`.

    Attributes:
        reference: cache of reference log-probabilities, once `open_reference` was called; without one they are NaN in
            the batches.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reduction = "sample"
        self.reference: ReferenceCache | None = None
        self._answers: Corpus | None = None

    # -- set-up ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Measure once, in one process of a node, so that the others find the index in the cache."""
        super().prepare_data()
        if self.config.cache_dir is not None:
            self.read_answers(progress=True, look_again=self.look_again)

    def _measure(self) -> None:
        super()._measure()
        answers = self._answers = self.read_answers(progress=self.config.cache_dir is None)
        if answers is not None:
            self.ledger.add(answers.rejects, write=self._rank == 0)
            self._num_rows += len(answers) + sum(line.counted for line in answers.rejects)
            self.ledger.check(self._num_rows, self.config.reject_limit, answers.rejects)

    def read_answers(self, *, progress: bool, look_again: bool = False) -> Corpus | None:
        """Conversations of `data.generation_meta`, measured or from the cache; None without.

        Raises:
            ValueError: as `read_corpus`.
        """
        meta = self.config.generation_meta
        return None if meta is None else self._read(meta, super()._encoder(training=False), progress, look_again)

    @property
    def _corpora(self) -> tuple[Corpus | None, ...]:
        return *super()._corpora, self._answers

    @property
    def answer_corpus(self) -> Corpus | None:
        """Conversations of `data.generation_meta`."""
        return self._answers

    def _encoder(self, *, training: bool) -> EncoderFactory:
        return self._factory(PairEncoder, training=training)

    # -- loaders --------------------------------------------------------------------------------------------------

    def _train_dataset(self, corpus: Corpus) -> Dataset[Any]:
        return self._pairs(corpus, training=True, reference=self._known(corpus))

    def _val_dataset(self, corpus: Corpus) -> Dataset[Any]:
        return self._pairs(corpus, training=False, reference=self._known(corpus))

    def _pairs(self, corpus: Corpus, *, training: bool, reference: ReferenceLogps | None) -> PairDataset:
        left_out = self.ledger.left_out if training else frozenset()
        seed = self.config.augmentation_seed if training else None
        options = {**self._dataset_options, "left_out": left_out}
        return PairDataset(corpus, augmentation_seed=seed, reference=reference, **options)

    def _known(self, corpus: Corpus) -> ReferenceLogps | None:
        return None if self.reference is None else self.reference.look_up(corpus)

    # -- reference ------------------------------------------------------------------------------------------------

    def open_reference(self, deciding: Mapping[str, Any]) -> None:
        """Use the cache of a reference model.

        Args:
            deciding: what decides its log-probabilities besides data and their settings: weights, dtype, attention.
        """
        folder = self._cache_dir
        if folder is None:
            folder = Path(self.trainer.default_root_dir if self.trainer is not None else ".")
        seed = self.config.augmentation_seed
        self.reference = ReferenceCache(folder, {**deciding, "augmentation_seed": seed})

    def unscored(self) -> list[tuple[Corpus, bool, NDArray[np.int64]]]:
        """Rows that this run needs and the cache does not have: corpus, whether it is trained on, rows.

        Rows that broke before are not tried again. All ranks get what the first one sees.
        """
        needed = self._needed()
        agreed = [self._missing(corpus, rows) for corpus, _, rows in needed] if self._rank == 0 else []
        if self._world_size > 1:
            assert self.trainer is not None
            agreed = self.trainer.strategy.broadcast(agreed)
        return [(*need[:2], rows) for need, rows in zip(needed, agreed, strict=True) if len(rows)]

    def count_missing(self) -> int:
        """How many of the rows that this run needs are not in the cache as this rank sees it."""
        return sum(len(self._missing(corpus, rows)) for corpus, _, rows in self._needed())

    def _needed(self) -> list[tuple[Corpus, bool, NDArray[np.int64]]]:
        needed = [(self.stream.view, True, self.stream.pairs.used_rows(self._max_steps))]
        if self.val_corpus is not None and len(self.val_corpus):
            needed.append((self.val_corpus, False, np.arange(len(self.val_corpus))))
        return needed

    def _missing(self, corpus: Corpus, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self.reference is not None
        self.ledger.read_others()
        missing = np.intersect1d(rows, self.reference.look_up(corpus).missing)
        return np.setdiff1d(missing, corpus.rows_of(self.ledger.left_out))

    def scoring_loader(self, corpus: Corpus, training: bool, rows: NDArray[np.int64]) -> DataLoader[PreferenceBatch]:
        """This rank's share of some rows, each once, as they are in training or validation."""
        packs = self.stream.pairs.packs_of(rows) if training else self._val_packs(corpus, rows)
        planned = dealt_once(packs, weight_sum=1.0, rank=self._rank, world_size=self._world_size)
        return self._loader(self._pairs(corpus, training=training, reference=None), FixedSampler(planned))

    def _val_packs(self, corpus: Corpus, rows: NDArray[np.int64]) -> list[Pack]:
        planner = PackPlanner(self.config.max_tokens, self.config.max_pack_tiles)
        tokens, tiles = corpus.plan_rows.tokens[rows], corpus.plan_rows.tiles[rows]
        return [
            Pack(tuple(rows[list(pack.samples)].tolist()), pack.tokens, pack.tiles)
            for pack in planner.plan(tokens, tiles)
        ]

    def keep_scores(
        self, corpus: Corpus, rows: Sequence[int], checksums: Sequence[int], logps: Sequence[Tensor]
    ) -> None:
        """Write reference log-probabilities to the cache.

        Args:
            corpus: the rows are of it.
            rows: of a scoring loader's batches, n in all.
            checksums: of each row's input.
            logps: float32 `[D, 2]` of each batch, n rows in all.

        Raises:
            IndexWriteError: the folder does not take them.
        """
        assert self.reference is not None
        if rows:
            values = np.concatenate([value.float().cpu().numpy() for value in logps])
            self.reference.add(row_keys(corpus)[list(rows)].tolist(), values, checksums)
