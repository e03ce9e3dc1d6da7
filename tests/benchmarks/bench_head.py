"""Output head and loss at the vocabulary of InternVL 2.5, supervised rows alone and full logits: `make bench`.

8,192 hidden states of 896 channels, 151,674 words, 15 % of the tokens supervised in runs of 64, float32, forward and
backward. The other way is transformers' own: logits of all rows, and its loss for causal models. Each way runs in a
process of its own, one thread; time is its CPU time, memory the most that is resident beyond hidden states and weights,
the gradient of the weights (0.54 GB) included. Both must give the same loss and gradients.

    bench_head.py --tokens 2048    where 15 GB are not free
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from resident import resident, start_peak
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.losses.next_token import NextTokenLoss

VOCABULARY, CHANNELS, RUN, SUPERVISED = 151_674, 896, 64, 0.15
PROMISED = 8.0
SAME = 2e-5


@dataclass(frozen=True, slots=True)
class Reading:
    """Loss, norms of the gradients of hidden states and weights, CPU seconds, peak in bytes."""

    loss: float
    hidden: float
    head: float
    seconds: float
    peak: int


def make_labels(tokens: int) -> Tensor:
    """Runs of 64 supervised tokens, spread out evenly; `[tokens]`."""
    labels = torch.full((tokens,), IGNORE_INDEX)
    runs = int(SUPERVISED * tokens / RUN)
    for number in range(runs):
        start = 1 + number * (tokens - 1) // runs
        labels[start : start + RUN] = torch.randint(0, VOCABULARY, (RUN,))
    return labels


def full_logits(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden[None], head)
    return ForCausalLMLoss(logits, labels[None], VOCABULARY)


def supervised_rows(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    rows = (labels[1:] != IGNORE_INDEX).nonzero().flatten()
    weights = torch.full((len(rows),), 1 / len(rows))
    return NextTokenLoss("token")(hidden.index_select(0, rows), head, labels[rows + 1], weights)[0]


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full logits (transformers)": full_logits,
    "supervised rows, in chunks": supervised_rows,
}


def measure(connection: Connection, way: str, tokens: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, CHANNELS, requires_grad=True)
    head = torch.nn.Parameter(torch.randn(VOCABULARY, CHANNELS) * 0.02)
    labels = make_labels(tokens)
    # What the first product sets up is no cost of a step.
    (hidden[:2] @ head[:8].T).sum().item()
    base, start = start_peak(), time.process_time()
    loss = WAYS[way](hidden, head, labels)
    loss.backward()
    seconds, peak = time.process_time() - start, resident("VmHWM") - base
    connection.send(Reading(loss.item(), float(hidden.grad.norm()), float(head.grad.norm()), seconds, peak))


def run(way: str, tokens: int) -> Reading:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs, way, tokens), daemon=True)
    process.start()
    theirs.close()
    reading = ours.recv()
    process.join()
    return reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    readings = [run(way, tokens) for way in WAYS]
    full, ours = readings
    labeled = int((make_labels(tokens) != IGNORE_INDEX).sum())
    print(f"{tokens:,} tokens, {labeled:,} supervised, vocabulary {VOCABULARY:,}\n")
    print(
        "| way | CPU s | full / this | peak GB | full / this | loss | gradient norms |\n|---|---|---|---|---|---|---|"
    )
    for way, one in zip(WAYS, readings, strict=True):
        cells = [
            way,
            f"{one.seconds:.1f}",
            f"**{full.seconds / one.seconds:.1f}**",
            f"{one.peak / 1e9:.2f}",
            f"**{full.peak / one.peak:.1f}**",
            f"{one.loss:.5f}",
            f"{one.hidden:.5f}, {one.head:.5f}",
        ]
        print(f"| {' | '.join(cells)} |")
    for name in ("loss", "hidden", "head"):
        if abs(getattr(full, name) / getattr(ours, name) - 1) > SAME:
            raise SystemExit(f"the ways do not compute the same: {name} {getattr(full, name)}, {getattr(ours, name)}")
    ratios = {"time": full.seconds / ours.seconds, "memory": full.peak / ours.peak}
    missed = [f"{name} {ratio:.2f} < {PROMISED}" for name, ratio in ratios.items() if ratio < PROMISED]
    if missed:
        raise SystemExit(f"the head is not as lean as promised: {', '.join(missed)}")


if __name__ == "__main__":
    main()
