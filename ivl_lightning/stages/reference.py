"""Log-probabilities under the reference model: in one pass before training, kept on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor, nn

from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.data.ranks import gathered
from ivl_lightning.inference.progress import PassProgress
from ivl_lightning.stages.root import InternVLWithLogps
from ivl_lightning.structures import PreferenceBatch

_KEEP_SECONDS = 30.0
"""Scores are written after so many seconds: what a kill can cost."""
_WAIT_SECONDS = 2.0
_SLICE_ROWS = 20_000
_HELD, _BUSY = "held", "busy"
_log = logging.getLogger(__name__)


def score_missing(root: InternVLWithLogps, datamodule: PreferenceDataModule, trainer: L.Trainer) -> int:
    """Score the pairs that this run needs and the cache does not have; every rank must call it.

    One of several runs over the same pairs scores them, the others wait for it.

    Args:
        root: with the weights of the reference model; run in eval mode.
        datamodule: with an open cache; see `PreferenceDataModule.open_reference`.
        trainer: its device, precision and ranks are used.

    Returns:
        How many pairs were scored, over all ranks.

    Raises:
        ValueError: the reference model gives no numbers; or other ranks do not find what this one wrote.
        TooManyRejectsError: more pairs cannot be read than `data.reject_limit` allows.
    """
    assert datamodule.reference is not None
    with _only_one(datamodule, trainer):
        # Another run may have scored them while this one waited.
        work = datamodule.unscored()
        if not work:
            return 0
        with eval_mode(root):
            scored = sum(_score(root, *part, datamodule=datamodule, trainer=trainer) for part in work)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            datamodule.reference.merge()
        trainer.strategy.barrier()
        _check_shared(datamodule, trainer, broken=sum(len(rows) for *_, rows in work) - scored)
    return scored


def _score(
    root: InternVLWithLogps,
    corpus: Corpus,
    training: bool,
    rows: NDArray[np.int64],
    *,
    datamodule: PreferenceDataModule,
    trainer: L.Trainer,
) -> int:
    """Score some rows of a corpus; returns how many could be, over all ranks."""
    known: list[int] = []
    checksums: list[int] = []
    logps: list[Tensor] = []
    scored, broken, since = 0, 0, time.monotonic()
    name, show = "training" if training else "validation", trainer.is_global_zero
    counter = PassProgress("reference log-probabilities,", "pairs", len(rows), show=show)
    # Not inference mode: what FSDP gathers in it could not be trained with later.
    with counter as progress, torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in _batches(corpus, training, rows, datamodule):
            moved = datamodule.transfer_batch_to_device(batch, trainer.strategy.root_device, 0)
            logps.append(_finite(root(moved).detach(), batch))
            known += batch.sample_rows
            checksums += batch.checksums
            scored += batch.num_pairs
            broken += datamodule.note_rejects(batch.rejects)
            progress.advance(name, len(batch.planned.pack.samples) * trainer.world_size)
            if time.monotonic() - since > _KEEP_SECONDS:
                datamodule.keep_scores(corpus, known, checksums, logps)
                known, checksums, logps, since = [], [], [], time.monotonic()
    datamodule.keep_scores(corpus, known, checksums, logps)
    own = torch.tensor([float(scored), float(broken)], device=trainer.strategy.root_device)
    all_scored, all_broken = trainer.strategy.reduce(own, reduce_op="sum").tolist()
    datamodule.note_rejects_elsewhere(int(all_broken) - broken)
    return int(all_scored)


def _batches(
    corpus: Corpus, training: bool, rows: NDArray[np.int64], datamodule: PreferenceDataModule
) -> Iterator[PreferenceBatch]:
    """This rank's batches, a slice of the rows after the other: packing millions of rows at once would take minutes."""
    for start in range(0, len(rows), _SLICE_ROWS):
        yield from datamodule.scoring_loader(corpus, training, rows[start : start + _SLICE_ROWS])


def _finite(logps: Tensor, batch: PreferenceBatch) -> Tensor:
    bad = ~logps.isfinite().all(dim=1)
    if bad.any():
        names = [name for name, is_bad in zip(batch.sample_ids, bad.tolist(), strict=True) if is_bad]
        raise ValueError(
            f"the reference model gives log-probabilities that are no numbers for {', '.join(names)}: its weights are "
            "broken, or its precision does not suffice"
        )
    return logps


def _check_shared(datamodule: PreferenceDataModule, trainer: L.Trainer, *, broken: int) -> None:
    left = max(gathered(datamodule.count_missing(), trainer.world_size))
    if left > broken:
        assert datamodule.reference is not None
        raise ValueError(
            f"{left} pairs have no reference log-probabilities after all were scored ({broken} could not be read): "
            f"give data.cache_dir a folder that all nodes share, not {datamodule.reference.folder.parent}"
        )


@contextmanager
def _only_one(datamodule: PreferenceDataModule, trainer: L.Trainer) -> Iterator[None]:
    """Hold the cache's lock on the first rank; the other ranks wait with it, a short collective at a time."""
    assert datamodule.reference is not None
    folder = datamodule.reference.folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    waited = False
    while True:
        state = trainer.strategy.broadcast(_acquire(lock) if trainer.is_global_zero else "")
        if state == _HELD:
            break
        if state != _BUSY:
            raise ValueError(f"data.cache_dir={folder.parent} cannot be locked: {state}. Give another folder")
        if not waited and trainer.is_global_zero:
            _log.warning(
                "another run computes the same reference log-probabilities; waiting for it (%s)", lock.lock_file
            )
        waited = True
        time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock) -> str:
    """Whether the lock is held now, busy, or why it cannot be had; for all ranks to know."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _BUSY
    except (OSError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return _HELD


@contextmanager
def eval_mode(root: nn.Module) -> Iterator[None]:
    """No drop path: the reference model is a fixed function. Modes are given back as they were."""
    modes = {module: module.training for module in root.modules()}
    root.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
