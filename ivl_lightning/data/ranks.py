"""What data-parallel ranks tell each other about their data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ivl_lightning.data.corpus import Corpus

Value = TypeVar("Value")


def gathered(value: Value, world_size: int) -> list[Value]:
    """The value of each rank; all ranks call it.

    Args:
        value: what pickles.
        world_size: number of ranks; one asks nobody.
    """
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def gathered_numbers(numbers: Sequence[float], world_size: int, device: torch.device) -> Tensor:
    """Numbers of each rank, float32 `[world_size, n]` on `device`; all ranks call it with as many.

    Args:
        numbers: of this rank.
        world_size: number of ranks; one asks nobody.
        device: where the ranks can talk to each other.
    """
    own = torch.tensor(numbers, dtype=torch.float32, device=device)
    every = own.expand(world_size, -1).contiguous()
    if world_size > 1:
        torch.distributed.all_gather(list(every), own)
    return every


def check_agreement(problem: ValueError | None, corpora: Sequence[Corpus | None], world_size: int) -> None:
    """Every rank plans by itself, so all must see the same rows, and all must stop where one has to.

    Args:
        problem: why this rank cannot go on; None if it can.
        corpora: of training and validation; None where there is none.
        world_size: number of ranks.

    Raises:
        ValueError: `problem`; or another rank cannot go on, or sees other rows than the first one.
    """
    rows = [
        (index.name, len(index), index.fingerprint)
        for corpus in corpora
        if corpus is not None
        for index in corpus.indexes
    ]
    seen = gathered((None if problem is None else str(problem), rows), world_size)
    if problem is not None:
        raise problem
    for rank, (message, _) in enumerate(seen):
        if message is not None:
            raise ValueError(f"rank {rank} cannot go on: {message}")
    for rank, (_, other) in enumerate(seen):
        if other != seen[0][1]:
            raise ValueError(
                f"the ranks see different rows, so their plans would differ: rank 0: {seen[0][1]}, rank {rank}: "
                f"{other}. Give all nodes the same files, and data.cache_dir a folder that all of them share"
            )
