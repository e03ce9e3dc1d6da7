"""Run by torchrun: BCO losses and reward shifts of each rank. Started once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from ivl_lightning.losses.preference import SigmoidPreference
from ivl_lightning.losses.quality import BCOPair
from ivl_lightning.structures import PairScores
from tests.pair_scores import from_rewards

RANKS, STEPS = 2, 3
# (r_c, r_r) of two micro-batches on each of two ranks.
WORKED = [[(1.0, 0.2), (2.0, 1.0)], [(0.4, -0.6), (0.0, -1.0)]]
NO_PAIR = ((), ())


def random_batch(rank: int, step: int) -> PairScores:
    """Different numbers of pairs on each rank; rank 1 has none in step 1."""
    pairs = 0 if (rank, step) == (1, 1) else 3 + 2 * rank
    generator = torch.Generator().manual_seed(10 * step + rank)
    return from_rewards(*torch.randn(2, pairs, generator=generator, dtype=torch.float64))


def follow(head: BCOPair, steps: Sequence[Sequence[PairScores]]) -> list[tuple[float, float, float]]:
    """Sum of losses, shift and count behind each step of one or more micro-batches."""
    states = []
    for micro_batches in steps:
        loss = sum(head(pairs).sum().item() for pairs in micro_batches)
        head.end_step()
        states.append((loss, head.shift.mean.item(), head.shift.count.item()))
    return states


def worked(rank: int) -> list[tuple[float, float, float]]:
    """Shift, sigmoid and BCO loss of the worked table."""
    head, preference = BCOPair(), SigmoidPreference()
    rows = []
    for chosen, rejected in WORKED[rank]:
        pairs = from_rewards([chosen], [rejected])
        bco = head(pairs).item()
        rows.append((head.shift.mean.item(), preference(pairs).item(), bco))
    return rows


def run(rank: int) -> dict[str, Any]:
    """All cases on one rank."""
    one_sided = [from_rewards(*(([1.0], [0.0]) if rank == 0 else NO_PAIR)), from_rewards(*NO_PAIR)]
    return {
        "worked": worked(rank),
        **{
            f"one_sided/{update}": follow(BCOPair(update=update), [[pairs] for pairs in one_sided])
            for update in ("micro_batch", "pair", "step")
        },
        **{
            f"random/{update}": follow(BCOPair(update=update), [[random_batch(rank, step)] for step in range(STEPS)])
            for update in ("pair", "step")
        },
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, run(dist.get_rank()))
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
