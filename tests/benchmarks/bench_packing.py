"""PackPlanner and other packers side by side on a made-up stream: `make bench`, or this file with `--samples 50000`.

The stream is that of `streams.py`; 50,000 samples of seed 0 are the reference stream. Columns of the first table:

- packs, and `eff`: the fewest packs that tokens and tiles allow, as a share of them. A packer that ignores tiles may
  pass 100 %, for its packs are over the cap (`over cap`: share of packs).
- `useful`: real work / (8 x the slowest rank's work), summed over steps of 8 ranks, for a language model of 1B and of
  8B parameters. The last 2 % of the steps are left out. Blank tiles are work for a rank but not useful.
- `moved`: |place out - place in| in samples, 99th percentile. Sharded packers, one a rank, are counted by shard.
- samples/s of CPU time on one core: set OMP_NUM_THREADS=1, and compare only within one run.
- state: bytes of the largest pickled state met on the way.

The second table shows the planner alone on another seed and on mixtures with more pictures and with more text.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from packing_baselines import Packs, buffered_first_fit, first_fit_decreasing, next_fit, token_greedy
from streams import MIXTURE, TEXT_HEAVY, TILE_HEAVY, Stream, make_stream

from ivl_lightning.data.packing import PackPlanner

MAX_TOKENS = 16_384
NUM_RANKS = 8
SKIPPED_STEPS = 0.02
COSTS = {"1B": (1.0e9, 4.3e4, 0.73e12), "8B": (14.2e9, 2.6e5, 0.73e12)}
"""Modeled cost per token, per squared document length, per tile."""

IntArray = NDArray[np.int64]
Packer = Callable[[IntArray, IntArray, int, int], Packs]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A packer and how it is run.

    Attributes:
        name: in the table.
        packer: tokens, tiles and both caps in, packs out.
        sharded: one packer a rank, on every eighth sample; else one packer deals its packs to the ranks in turn.
        blank_tiles: text carries a tile.
    """

    name: str
    packer: Packer
    sharded: bool = False
    blank_tiles: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What the packs of a contestant amount to; see the module."""

    packs: int
    efficiency: float
    useful: dict[str, float]
    moved: float
    over_cap: float
    samples_per_second: float

    def cells(self) -> list[str]:
        return [
            f"{self.packs:,}",
            f"{self.efficiency:.2%}",
            *(f"{self.useful[model]:.2%}" for model in COSTS),
            f"{self.moved:.0f}",
            f"{self.over_cap:.1%}",
            f"{self.samples_per_second:,.0f}",
        ]


def planner(pool_size: int, world_size: int, model: str = "1B") -> Packer:
    """PackPlanner in the shape of the other packers."""

    def pack(tokens: IntArray, tiles: IntArray, max_tokens: int, max_tiles: int) -> Packs:
        made = PackPlanner(max_tokens, max_tiles, pool_size, world_size, cost=COSTS[model])
        return [list(pack.samples) for pack in made.plan(tokens, tiles)]

    return pack


CONTESTANTS = (
    Contestant("next fit", next_fit, sharded=True),
    Contestant("OpenGVLab rule, 20 buffers", buffered_first_fit, sharded=True, blank_tiles=True),
    Contestant("the same without blank tiles", buffered_first_fit, sharded=True),
    Contestant("VeOmni rule, tokens only, 64 samples", token_greedy, sharded=True),
    Contestant("offline first fit decreasing", first_fit_decreasing),
)
PLANNERS = {
    "planner, pool 64": (64, 1, "1B"),
    "planner, pool 512, groups of 8, 1B": (512, 8, "1B"),
    "planner, pool 512, groups of 8, 8B": (512, 8, "8B"),
    "planner, pool 512, groups of 512, 1B": (512, 512, "1B"),
}


def compete(contestant: Contestant, stream: Stream, max_tiles: int) -> Result:
    """Run one packer over the stream."""
    tiles = np.maximum(stream.tiles, 1) if contestant.blank_tiles else stream.tiles
    shards = [np.arange(rank, len(tiles), NUM_RANKS) for rank in range(NUM_RANKS)]
    if not contestant.sharded:
        shards = [np.arange(len(tiles))]
    start = time.process_time()
    packed = [contestant.packer(stream.tokens[shard], tiles[shard], MAX_TOKENS, max_tiles) for shard in shards]
    seconds = time.process_time() - start
    moved = [np.abs(np.concatenate(packs) - np.arange(len(shard))) for packs, shard in zip(packed, shards, strict=True)]
    packs = [shard[pack] for mine, shard in zip(packed, shards, strict=True) for pack in mine]
    check(packs, len(tiles))
    ranks = packed if contestant.sharded else [packed[0][rank::NUM_RANKS] for rank in range(NUM_RANKS)]
    owners = shards if contestant.sharded else shards * NUM_RANKS
    bound = max(stream.tokens.sum() / MAX_TOKENS, stream.tiles.sum() / max_tiles)
    over = [stream.tokens[pack].sum() > MAX_TOKENS or tiles[pack].sum() > max_tiles for pack in packs]
    dealt = [[shard[pack] for pack in mine] for mine, shard in zip(ranks, owners, strict=True)]
    return Result(
        packs=len(packs),
        efficiency=bound / len(packs),
        useful={model: useful_work(dealt, stream, tiles, cost) for model, cost in COSTS.items()},
        moved=float(np.percentile(np.concatenate(moved), 99)),
        over_cap=float(np.mean(over)),
        samples_per_second=len(tiles) / seconds,
    )


def check(packs: list[IntArray], num_samples: int) -> None:
    """Every sample once."""
    if not np.array_equal(np.sort(np.concatenate(packs)), np.arange(num_samples)):
        raise AssertionError("samples were lost or doubled")


def useful_work(
    dealt: list[list[IntArray]], stream: Stream, tiles: IntArray, cost: tuple[float, float, float]
) -> float:
    """Share of the ranks' time that is spent on samples; `tiles` are those that are computed, blank ones too."""
    per_token, per_square, per_tile = cost
    text = per_token * stream.tokens + per_square * stream.tokens.astype(np.float64) ** 2
    spent, useful = text + per_tile * tiles, text + per_tile * stream.tiles
    num_steps = int(min(len(packs) for packs in dealt) * (1 - SKIPPED_STEPS))
    slowest = sum(max(spent[packs[step]].sum() for packs in dealt) for step in range(num_steps))
    done = sum(useful[pack].sum() for packs in dealt for pack in packs[:num_steps])
    return float(done / (NUM_RANKS * slowest))


def state_size(stream: Stream, max_tiles: int, pool_size: int, world_size: int, model: str) -> int:
    """Bytes of the largest pickled state, looked at once a group."""
    made = PackPlanner(MAX_TOKENS, max_tiles, pool_size, world_size, cost=COSTS[model])
    packs = made.plan(stream.tokens, stream.tiles)
    return max(len(pickle.dumps(made.state_dict())) for number, _ in enumerate(packs) if number % world_size == 0)


def table(header: list[str], rows: Iterator[list[str]]) -> None:
    """Print Markdown, row by row as they come."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def side_by_side(stream: Stream, caps: list[int]) -> Iterator[list[str]]:
    """Rows of the first table."""
    for max_tiles in caps:
        for contestant in CONTESTANTS:
            yield [str(max_tiles), contestant.name, *compete(contestant, stream, max_tiles).cells(), ""]
        for name, settings in PLANNERS.items():
            result = compete(Contestant(name, planner(*settings)), stream, max_tiles)
            yield [str(max_tiles), name, *result.cells(), f"{state_size(stream, max_tiles, *settings):,}"]


def elsewhere(num_samples: int, seed: int, caps: list[int]) -> Iterator[list[str]]:
    """Rows of the second table."""
    streams = {
        f"seed {seed + 1}": partial(make_stream, num_samples, seed + 1, MIXTURE),
        "tile-heavy": partial(make_stream, num_samples, seed + 1, TILE_HEAVY),
        "text-heavy": partial(make_stream, num_samples, seed + 1, TEXT_HEAVY),
    }
    for stream_name, make in streams.items():
        stream = make()
        for max_tiles in caps:
            for name, settings in list(PLANNERS.items())[:3]:
                result = compete(Contestant(name, planner(*settings)), stream, max_tiles)
                yield [stream_name, str(max_tiles), name, *result.cells()]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--caps", type=int, nargs="+", default=[48, 64, 96], help="tiles of a pack at most")
    options = parser.parse_args()
    columns = ["packs", "eff", "useful 1B", "useful 8B", "moved p99", "over cap", "samples/s"]
    stream = make_stream(options.samples, options.seed)
    table(["tiles", "packer", *columns, "state"], side_by_side(stream, options.caps))
    table(["stream", "tiles", "packer", *columns], elsewhere(options.samples, options.seed, options.caps))


if __name__ == "__main__":
    main()
