"""Log-probabilities of the reference model on disk: computed once, read by every run over the same pairs.

A folder is named by a hash of all that decides them but the pair: model weights, dtype, attention, augmentation seed.
In it a pair is known by its content and its dataset's settings. Parts are whole or not there, and any number of
processes may add some; a damaged part is named, and its pairs are computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.hashing import splitmix64
from ivl_lightning.data.index_file import writing
from ivl_lightning.models.tokenizer import tokenizer_fingerprint

_VERSION = 2
_FEW_PARTS = 256
_TYPES: dict[str, type[np.generic]] = {
    "key": np.uint64,
    "chosen": np.float32,
    "rejected": np.float32,
    "checksum": np.uint32,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """Reference log-probabilities of the rows of a corpus.

    Attributes:
        logps: float32 `[N, 2]`, summed over the chosen and the rejected response; NaN where not known.
        checksums: uint32 `[N]`, of the input they were computed on; see `collate_pairs.checksum`.
        folder: where they lie.
    """

    logps: NDArray[np.float32]
    checksums: NDArray[np.uint32]
    folder: Path

    @property
    def missing(self) -> NDArray[np.int64]:
        """Rows that are not known, `[n]`."""
        return np.flatnonzero(~np.isfinite(self.logps).all(axis=1))


class ReferenceCache:
    """The log-probabilities under one reference model.

    Args:
        folder: of all caches.
        deciding: what decides the log-probabilities besides the pairs; plain JSON values. It is written beside them.
    """

    def __init__(self, folder: Path, deciding: Mapping[str, Any]) -> None:
        settings = {"version": _VERSION, **deciding}
        text = json.dumps(settings, sort_keys=True)
        self.folder = folder / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
        self._settings = json.dumps(settings, sort_keys=True, indent=2)

    def look_up(self, corpus: Corpus) -> ReferenceLogps:
        """What is known of a corpus."""
        table = self._read()
        keys = row_keys(corpus)
        order = np.argsort(table["key"], kind="stable")
        known = table["key"][order]
        place = np.searchsorted(known, keys)
        found = place < len(known)
        found[found] = known[place[found]] == keys[found]
        logps = np.full((len(keys), 2), np.nan, np.float32)
        checksums = np.zeros(len(keys), np.uint32)
        rows = order[place[found]]
        logps[found, 0], logps[found, 1] = table["chosen"][rows], table["rejected"][rows]
        checksums[found] = table["checksum"][rows]
        return ReferenceLogps(logps, checksums, self.folder)

    def add(self, keys: Sequence[int], logps: NDArray[np.float32], checksums: Sequence[int]) -> None:
        """Keep the log-probabilities of some pairs.

        Args:
            keys: see `row_keys`.
            logps: `[n, 2]`.
            checksums: of the inputs.

        Raises:
            IndexWriteError: the folder does not take them.
        """
        about = self.folder / "settings.json"
        if not about.is_file():
            with writing(about) as aside:
                aside.write_text(self._settings, encoding="utf-8")
        columns = (keys, logps[:, 0], logps[:, 1], checksums)
        arrays = {name: np.array(column, dtype) for (name, dtype), column in zip(_TYPES.items(), columns, strict=True)}
        with writing(self.folder / f"{time.time_ns()}-{os.getpid()}.parquet") as aside:
            pq.write_table(pa.table(arrays), aside, write_page_checksum=True)

    def merge(self) -> None:
        """Make one part of many, for later runs to read faster; to be called by whoever holds the cache's lock.

        Raises:
            IndexWriteError: the folder does not take it.
        """
        paths = sorted(self.folder.glob("*.parquet"))
        if len(paths) <= _FEW_PARTS:
            return
        table = self._read()
        self.add(
            table["key"].tolist(), np.stack([table["chosen"], table["rejected"]], axis=1), table["checksum"].tolist()
        )
        for path in paths:
            path.unlink(missing_ok=True)

    def _read(self) -> dict[str, NDArray[Any]]:
        # Whoever merges writes the whole before it removes the parts: where one is gone, another look finds all.
        while None in (parts := [_read_part(path) for path in sorted(self.folder.glob("*.parquet"))]):
            continue
        return {
            name: np.concatenate([np.empty(0, dtype), *(part[name] for part in parts if part is not None)])
            for name, dtype in _TYPES.items()
        }


def _read_part(path: Path) -> dict[str, NDArray[Any]] | None:
    """Columns of a part; None where it is gone, or was damaged and is set aside now."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        return {name: table[name].to_numpy().astype(dtype, copy=False) for name, dtype in _TYPES.items()}
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        # Set aside and not removed: on a shared disk a passing fault looks alike. Another rank may have been first.
        aside = path.with_suffix(".damaged")
        with suppress(FileNotFoundError):
            path.rename(aside)
        _log.warning("%s is damaged (%s); it is %s now, and its pairs are computed again", path, error, aside)
        return None


def row_keys(corpus: Corpus) -> NDArray[np.uint64]:
    """64 bits for each row of a corpus: its content and its dataset's settings, `[N]`."""
    keys = [
        splitmix64(index.columns["digest"].astype(np.uint64), _dataset_key(encoder))
        for encoder, index in zip(corpus.encoders, corpus.indexes, strict=True)
    ]
    return np.concatenate([np.empty(0, np.uint64), *keys])


def _dataset_key(encoder: RowEncoder) -> int:
    """Hash of what makes ids and pixels of a row: reader, tiling, sampling, template, tokenizer, degradation."""
    settings = asdict(encoder.settings)
    if encoder.settings.over_length == "reject":
        # Caps then only say which pairs there are.
        for name in ("max_tokens", "max_pack_tokens", "max_pack_tiles"):
            del settings[name]
    parts = {
        "settings": settings,
        "reader": asdict(encoder.reader),
        "max_dynamic_patch": encoder.spec.max_dynamic_patch,
        "data_augment": encoder.spec.data_augment,
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
    }
    return int(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16], 16)
