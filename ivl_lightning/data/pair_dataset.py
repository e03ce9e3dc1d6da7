"""Map-style dataset of preference pairs: a planned pack -> tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.augmentation import sample_rng
from ivl_lightning.data.collate_pairs import checksum, pack_pairs
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.dataset import Place, PlannedDataset
from ivl_lightning.data.measuring import digest_number
from ivl_lightning.data.pair_encoding import PairEncoder
from ivl_lightning.data.reference_cache import ReferenceLogps
from ivl_lightning.structures import EncodedPair, PlannedPack, PreferenceBatch, Record, Reject, RowError


class PairDataset(PlannedDataset[EncodedPair, PreferenceBatch]):
    """Packs of preference pairs with their reference log-probabilities.

    Args:
        corpus: the rows.
        augmentation_seed: with a row's content, all that frames and JPEG degradation depend on: the same in every
            epoch and run, so that reference log-probabilities stay true. None never degrades (validation).
        reference: of all rows of the corpus; None where the reference model runs beside the policy.
        **options: see `PlannedDataset`.
    """

    def __init__(
        self, corpus: Corpus, *, augmentation_seed: int | None, reference: ReferenceLogps | None, **options: Any
    ) -> None:
        super().__init__(corpus, **options)
        self.augmentation_seed = augmentation_seed
        self.reference = reference

    def _encode(self, dataset: int, record: Record, epoch: int, sample: int, frames: int) -> EncodedPair:
        seed, row = self.augmentation_seed, sample % len(self.corpus)
        rng = None if seed is None else sample_rng(seed, 0, digest_number(record.digest))
        encoder = self.corpus.encoders[dataset]
        assert isinstance(encoder, PairEncoder)
        pair = encoder.encode_pair(record, rng, frames=frames or None)
        labels = sum(label != IGNORE_INDEX for label in (*pair.chosen_labels, *pair.rejected_labels))
        tokens = len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
        self._check_measured(row, frames, tokens, labels)
        if self.reference is not None:
            _check_reference(self.reference, row, pair)
        return pair

    def _lay_out(
        self, samples: list[EncodedPair], places: list[Place], planned: PlannedPack, rejects: tuple[Reject, ...]
    ) -> PreferenceBatch:
        rows = [place.row for place in places]
        known = self.reference
        logps = np.full((len(rows), 2), np.nan, np.float32) if known is None else known.logps[rows]
        return pack_pairs(
            samples,
            planned=planned,
            dataset_ids=[place.dataset for place in places],
            sample_ids=[place.name for place in places],
            sample_rows=rows,
            reference_logps=[(float(chosen), float(rejected)) for chosen, rejected in logps],
            filler_id=self.filler_id,
            tile_size=self.tile_size,
            rejects=rejects,
        )


def _check_reference(reference: ReferenceLogps, row: int, pair: EncodedPair) -> None:
    if not np.isfinite(reference.logps[row]).all():
        raise RowError(
            "reference_missing",
            "the pair has no reference log-probabilities: it could not be read when they were computed. Start the "
            "stage anew to compute what is missing",
        )
    if int(reference.checksums[row]) != checksum(pair):
        raise RowError(
            "reference_stale",
            "its picture is another one than when the reference log-probabilities were computed. Delete the folder "
            f"{reference.folder} to compute them again",
        )
