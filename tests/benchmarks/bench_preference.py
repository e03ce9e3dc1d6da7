"""A step of mixed preference optimization beside the way of the official trainer, in one run: `make bench`.

Ours: the prompt and its tiles once for both answers, log-probabilities of the reference model at hand, logits of the
supervised tokens alone, in chunks. The official way (`official_mpo.py`): both conversations whole, tiles twice, a
reference model that runs in every step, logits of all tokens. A step is forward, backward and AdamW, in float32.

Each way runs in a process of its own, and the two take turns. Time is user CPU time, the least of all turns, since the
kernel's share of large allocations differs most between machines; memory is the most that is resident in any step,
beyond what imports take, with every tensor of 1 MiB and more given back as soon as it is freed. FLOPs are counted by
torch, causal attention as half of full attention.

The shapes are InternVL 2.5 1B with a quarter of its width and an eighth of its layers: a tile costs as much as 1,001
tokens (the 1B: 1,009). Beside the other layers, attention over long rows weighs 4 times as much as there, and an output
head of 151,674 rows 32 times; the first table therefore has what the 1B itself would save, from its shapes alone.

    bench_preference.py --turns 5    steadier figures
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from official_mpo import OfficialMPO, stacked
from preference_shapes import LARGE, SMALL, build, random_pair, shapes
from resident import resident, start_peak
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ivl_lightning.losses.mpo import MPOLoss
from ivl_lightning.models.build import enable_activation_checkpointing
from ivl_lightning.models.cost import forward_cost
from ivl_lightning.stages.mixed_preference import published_mixture
from ivl_lightning.stages.root import InternVLWithLogps
from ivl_lightning.structures import EncodedPair, PairScores
from tests import tiny

TILES, TEXT_PER_TILE, ANSWER_PER_TILE = 8, 60, 32
SAME = 1e-4
WAYS = ("official", "ours")
# Else what the C library keeps for later counts as used.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured; a pair of 8 tiles has a prompt of 2,048 tokens and answers of 256."""

    vocabulary: int
    pairs: int = 1
    checkpointing: bool = False
    tiles: int = TILES

    @property
    def name(self) -> str:
        prompt = self.tiles * (196 + TEXT_PER_TILE)
        size = f"{self.tiles} tiles, {prompt:,} + 2 x {self.tiles * ANSWER_PER_TILE}"
        pairs = "1 pair" if self.pairs == 1 else f"{self.pairs} pairs"
        return f"{pairs} of {size}{', checkpointing' if self.checkpointing else ''}"


@dataclass(slots=True)
class Reading:
    """One step: its loss, seconds of user time, peak of resident bytes, FLOPs where they were counted."""

    loss: float
    user: float
    peak: int
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """The network that trains, the loss of its pairs, what follows the optimizer's step, and the reference pass."""

    policy: InternVLForConditionalGeneration
    loss: Callable[[], Tensor]
    finish: Callable[[], None] = lambda: None
    score: Callable[[], None] = lambda: None


def official(config: InternVLConfig, pairs: Sequence[EncodedPair], checkpointing: bool) -> Way:
    trainer = OfficialMPO(build(config, "sdpa"))
    inputs = stacked(pairs)
    if checkpointing:
        enable_activation_checkpointing(trainer.policy)
    return Way(trainer.policy, lambda: trainer.loss(inputs))


def ours(config: InternVLConfig, pairs: Sequence[EncodedPair], checkpointing: bool) -> Way:
    root = InternVLWithLogps(build(config, "ivl_packed")).train()
    mixture, batch = published_mixture(), tiny.pair_batch(pairs)
    with torch.no_grad():
        reference = root(batch)
    if checkpointing:
        enable_activation_checkpointing(root.internvl)

    def loss() -> Tensor:
        scores = PairScores(*root(batch).unbind(1), *reference.unbind(1), *batch.response_tokens.unbind(1))
        return mixture(scores).loss

    def score() -> None:
        with torch.no_grad():
            root(batch)

    return Way(root.internvl, loss, mixture.end_step, score)


def serve(connection: Connection, case: Case, way: str) -> None:
    """Take steps when told to: `count` for one under the counter, `step`, or `score` for the reference pass alone."""
    torch.set_num_threads(1)
    base = resident("VmRSS")
    config = shapes(case.vocabulary)
    rng = np.random.default_rng(0)
    sizes = (case.tiles, case.tiles * TEXT_PER_TILE, *(case.tiles * ANSWER_PER_TILE,) * 2)
    pairs = [random_pair(config, rng, *sizes) for _ in range(case.pairs)]
    held = {"official": official, "ours": ours}[way](config, pairs, case.checkpointing)
    optimizer = torch.optim.AdamW(held.policy.parameters(), lr=1e-6, weight_decay=0.05)

    def step() -> float:
        loss = held.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        held.finish()
        return loss.item()

    for command in iter(connection.recv, None):
        flops = 0
        with measured(base) as reading:
            if command == "count":
                with flop_counter() as counter:
                    reading.loss = step()
                flops = counter.get_total_flops()
            elif command == "step":
                reading.loss = step()
            else:
                held.score()
        reading.flops = flops
        connection.send(reading)


@contextmanager
def measured(base: int) -> Iterator[Reading]:
    """Seconds and peak of what runs inside."""
    start_peak()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    reading = Reading(0.0, 0.0, 0)
    yield reading

    reading.user = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    reading.peak = resident("VmHWM") - base


def flop_counter() -> FlopCounterMode:
    """torch's counter with what it does not know: attention on a CPU and in-place `addmm_`."""
    aten = torch.ops.aten

    def attention(query: Any, key: Any, value: Any, dropout: Any = 0, causal: bool = False, **_: Any) -> int:
        return int(sdpa_flop_count(query, key, value) // (2 if causal else 1))

    def backward(grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, *rest: Any, **_: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value) // (2 if rest[1] else 1))

    def product(out: Any, left: Any, right: Any, **_: Any) -> int:
        return int(2 * left[0] * left[1] * right[1])

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        aten.addmm_: product,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


# -- the two ways side by side ----------------------------------------------------------------------------------------


class Worker:
    """A process that holds one way.

    Attributes:
        readings: of its steps; the first one was counted.
    """

    def __init__(self, case: Case, way: str) -> None:
        self.readings: list[Reading] = []
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, case, way), daemon=True)
        os.environ.update(GIVE_BACK)
        self.process.start()
        theirs.close()

    def ask(self, command: str) -> Reading:
        self.connection.send(command)
        return self.connection.recv()

    def step(self, command: str = "step") -> None:
        self.readings.append(self.ask(command))

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def compare(case: Case, turns: int) -> str:
    """A row of the table.

    Raises:
        SystemExit: the first losses differ.
    """
    workers = {way: Worker(case, way) for way in WAYS}
    for turn in range(turns):
        for worker in workers.values():
            worker.step("step" if turn else "count")
    # Whatever the number of turns, our peak is one with the optimizer's state.
    workers["ours"].step()
    reference = min(workers["ours"].ask("score").user for _ in range(turns))
    for worker in workers.values():
        worker.close()
    theirs, mine = (workers[way].readings for way in WAYS)
    gap = abs(theirs[0].loss - mine[0].loss)
    if gap > SAME:
        raise SystemExit(f"{case.name}: the official loss is {theirs[0].loss}, ours {mine[0].loss}")
    slow, fast = (min(reading.user for reading in readings) for readings in (theirs, mine))
    large, small = (max(reading.peak for reading in readings[1:] or readings) / 1e9 for readings in (theirs, mine))
    cells = [
        f"{case.vocabulary:,}",
        case.name,
        f"{case.pairs / slow:.3f}",
        f"{case.pairs / fast:.3f}",
        f"**{slow / fast:.2f}**",
        f"{slow / (fast + reference):.2f}",
        f"{theirs[0].flops / mine[0].flops:.2f}",
        f"{large:.2f}",
        f"{small:.2f}",
        f"**{small / large:.0%}**",
        f"{gap:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def fitting(case: Case) -> Case:
    """The case, or half of it where the logits of all tokens do not fit: 6.2 copies of them were seen at a time."""
    rows = 2 * case.pairs * case.tiles * (196 + TEXT_PER_TILE + ANSWER_PER_TILE)
    needed = 4 * 6.5 * rows * case.vocabulary
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return case if needed < 0.95 * available else fitting(replace(case, tiles=case.tiles // 2))


# -- the same work ----------------------------------------------------------------------------------------------------


def same_work() -> None:
    """Loss and gradients of both ways on two pairs of unequal answers, with a policy that has left its reference.

    Raises:
        SystemExit: they differ.
    """
    config, rng = shapes(SMALL), np.random.default_rng(1)
    pairs = [random_pair(config, rng, tiles, *lengths) for tiles, *lengths in ((1, 40, 30, 17), (2, 9, 12, 33))]
    reference, policies = build(config, "ivl_packed"), [build(config, kind) for kind in ("sdpa", "ivl_packed")]
    for policy in policies:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-2)
    theirs = OfficialMPO(policies[0], build(config, "sdpa")).loss(stacked(pairs))
    batch = tiny.pair_batch(pairs)
    with torch.no_grad():
        known = InternVLWithLogps(reference)(batch)
    logps = InternVLWithLogps(policies[1])(batch)
    nll = -logps[:, 0].sum() / batch.response_tokens[:, 0].sum()
    mine = MPOLoss()(*logps.unbind(1), *known.unbind(1), nll).loss
    for loss in (theirs, mine):
        loss.backward()
    grads = [torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]) for policy in policies]
    gap = float((grads[0] - grads[1]).abs().max() / grads[0].abs().max())
    print(
        f"Same work, on a policy that has moved: loss {theirs.item():.5f} and {mine.item():.5f}, "
        f"largest difference of a gradient {gap:.0e} of the largest gradient; "
        f"rewards {[round(v, 2) for v in (0.1 * (logps - known)).flatten().tolist()]}\n",
        flush=True,
    )
    if abs(theirs.item() - mine.item()) > SAME or gap > SAME:
        raise SystemExit("the two ways do not compute the same")


# -- from shapes alone ------------------------------------------------------------------------------------------------


def work(config: InternVLConfig, tile_tokens: int, *, share: bool, with_reference: bool) -> float:
    """FLOPs of a step on one pair of the benchmark's tiles, text and answers.

    Args:
        config: shapes of the network.
        tile_tokens: tokens of a tile.
        share: prompt once and logits of the supervised tokens alone; else both conversations whole.
        with_reference: a forward pass of the reference model.
    """
    token, square, tile = forward_cost(config)
    text = config.text_config
    head = 2.0 * text.hidden_size * text.vocab_size
    prompt, answer = TILES * (tile_tokens + TEXT_PER_TILE), TILES * ANSWER_PER_TILE
    whole = prompt + answer
    if share:
        squares = prompt**2 + 2 * (whole**2 - prompt**2)
        body, logits = TILES * tile + (prompt + 2 * answer) * token + squares * square, 2 * answer * head
        # Backward makes the logits again.
        return (3 + with_reference) * body + (4 + with_reference) * logits
    body = 2 * (TILES * tile + whole * token + whole**2 * square)
    return (3 + with_reference) * (body + 2 * whole * head)


def print_shapes() -> None:
    """Cost of the shapes in use and of the 1B, and what the 1B would save."""
    print("| from shapes | GFLOP a tile | MFLOP a token | tile / token | step, official / ours | with reference pass |")
    print("|---|---|---|---|---|---|")
    real = shapes(LARGE, width=1, depth=1, tile_size=448)
    rows = [(f"in use, {size:,} rows", shapes(size), 196) for size in (SMALL, LARGE)]
    for name, config, tile_tokens in [*rows, (f"InternVL 2.5 1B, {LARGE:,} rows", real, 256)]:
        token, _, tile = forward_cost(config)
        theirs = work(config, tile_tokens, share=False, with_reference=True)
        once, always = (work(config, tile_tokens, share=True, with_reference=flag) for flag in (False, True))
        costs = f"{tile / 1e9:.1f} | {token / 1e6:.1f} | {tile / token:,.0f}"
        print(f"| {name} | {costs} | {theirs / once:.2f} | {theirs / always:.2f} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="steps of each way; at 151,674 rows 3 fewer, or 1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    same_work()
    print_shapes()
    print(
        "| vocabulary | step | official pairs/s | ours | ratio | with a reference pass | "
        "FLOPs | official GB | ours | share | losses differ |\n|---|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for case in (Case(SMALL), Case(SMALL, pairs=2), Case(SMALL, checkpointing=True)):
        print(compare(case, arguments.turns), flush=True)
    print(compare(fitting(Case(LARGE)), max(1, arguments.turns - 3)), flush=True)


if __name__ == "__main__":
    main()
