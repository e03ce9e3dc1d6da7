"""Useful tokens per second of a training step, packed and padded, in one process: `make bench`.

A tiny InternVL and 28 samples of the made-up stream (`step_shapes.py`): 23,037 tokens and 259 tiles. A step is forward,
backward and AdamW in float32; a step of its own for each pack or batch. Tokens are those of the samples, so padding
earns nothing. Two ways to feed it stand beside packs:

* padded: 4 samples in their order, padded to the longest, through transformers' own forward (sdpa, attention mask,
  logits of all tokens), as a trainer without packing does;
* length-grouped: the same with samples sorted by length first, and batches in random order.

All three see the same samples and weights; the sums of their losses and gradients are compared first. The ways take
turns round by round; a ratio is the median over the rounds, time is CPU time of one process with one thread.

    bench_step.py --rounds 9    steadier figures
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from preference_shapes import build
from step_shapes import VOCABULARY, PaddedBatch, make_samples, packed, padded, shapes
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import InternVLForConditionalGeneration

from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.structures import Encoded, PackedBatch

BATCH = 4
PROMISED = {"padded": 2.2, "length-grouped": 1.4}
SAME = 2e-5


@dataclass(slots=True)
class Way:
    """A way to feed the network.

    Attributes:
        network: that trains.
        batches: of all samples.
        loss: sum of cross entropies over the supervised tokens of a batch.
        physical: tokens of the batches with their padding.
        seconds: of each round.
    """

    network: InternVLForConditionalGeneration
    batches: Sequence[Any]
    loss: Callable[[Any], Tensor]
    physical: int
    seconds: list[float]
    optimizer: torch.optim.Optimizer


def ours(samples: Sequence[Encoded]) -> Way:
    """The root of the instruction-tuning stage over packs."""
    stage = InstructionTuning(build(shapes(), "ivl_packed"), loss=NextTokenLoss("token"))
    stage.configure_model()
    root = stage.root
    assert root is not None

    def loss(batch: PackedBatch) -> Tensor:
        return root(batch)[0]

    return _way(stage.internvl, list(packed(samples)), loss)


def theirs(samples: Sequence[Encoded]) -> Way:
    """transformers' own forward over padded batches."""
    network = build(shapes(), "sdpa").train()

    def loss(batch: PaddedBatch) -> Tensor:
        logits = network(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            use_cache=False,
        ).logits
        shifted = torch.nn.functional.pad(batch.labels, (0, 1), value=-100)[:, 1:]
        return cross_entropy(logits.float().view(-1, VOCABULARY), shifted.flatten(), reduction="sum")

    return _way(network, list(padded(samples, BATCH)), loss)


def grouped(samples: Sequence[Encoded]) -> Way:
    """The same over batches of like length."""
    way = theirs(sorted(samples, key=lambda sample: len(sample.input_ids)))
    batches = list(way.batches)
    random.Random(0).shuffle(batches)
    way.batches = batches
    return way


def _way(network: InternVLForConditionalGeneration, batches: Sequence[Any], loss: Callable[[Any], Tensor]) -> Way:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.01)
    return Way(network, batches, loss, sum(batch.input_ids.numel() for batch in batches), [], optimizer)


def same_work(ways: dict[str, Way]) -> float:
    """Largest difference between the ways in the sum of their losses (relative) and gradients (of the largest).

    Raises:
        SystemExit: they differ.
    """
    found = []
    for way in ways.values():
        total = 0.0
        for batch in way.batches:
            loss = way.loss(batch)
            loss.backward()
            total += loss.item()
        found.append((total, torch.cat([parameter.grad.flatten() for parameter in way.network.parameters()])))
        way.optimizer.zero_grad()
    (loss, gradient), *others = found
    gaps = [
        max(abs(total - loss) / loss, float((grad - gradient).abs().max() / gradient.abs().max()))
        for total, grad in others
    ]
    if max(gaps) > SAME:
        raise SystemExit(f"the ways do not compute the same: {gaps}")
    return max(gaps)


def run_round(way: Way, supervised: int) -> None:
    start = time.process_time()
    for batch in way.batches:
        (way.loss(batch) / supervised).backward()
        way.optimizer.step()
        way.optimizer.zero_grad()
    way.seconds.append(time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    samples = make_samples()
    useful = sum(len(sample.input_ids) for sample in samples)
    supervised = sum(sum(label >= 0 for label in sample.labels) for sample in samples)
    ways = {"padded": theirs(samples), "length-grouped": grouped(samples), "packed": ours(samples)}
    gap = same_work(ways)
    for _ in range(rounds):
        for way in ways.values():
            run_round(way, supervised)
    print(f"Sums of losses and gradients differ by at most {gap:.0e}.\n")
    print("| way | batches | tokens with padding | useful tokens/s | packed / this |\n|---|---|---|---|---|")
    ratios = {}
    for name, way in ways.items():
        pairs = zip(way.seconds, ways["packed"].seconds, strict=True)
        ratios[name] = statistics.median(slow / fast for slow, fast in pairs)
        rate = useful / statistics.median(way.seconds)
        print(f"| {name} | {len(way.batches)} | {way.physical:,} | {rate:,.0f} | **{ratios[name]:.2f}** |")
    missed = [f"{name} {ratios[name]:.2f} < {least}" for name, least in PROMISED.items() if ratios[name] < least]
    if missed:
        raise SystemExit(f"packed is not as fast as promised: {', '.join(missed)}")


if __name__ == "__main__":
    main()
