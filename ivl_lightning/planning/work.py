"""Floating-point operations of a step, bytes that ranks send each other, and the seconds that both take."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import InternVLConfig

from ivl_lightning.models.cost import forward_cost, head_cost, projector_cost, training_cost
from ivl_lightning.planning.hardware import Gpu
from ivl_lightning.planning.layout import FLOAT32, Layout
from ivl_lightning.planning.load import Load
from ivl_lightning.planning.network import Network, TrainedNetwork

_UPDATE_TRAFFIC = 7
"""Reads and writes of AdamW for a number that trains: weight and two moments, read and written, and its gradient."""


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of a step over all ranks.

    Attributes:
        forward: of what trains.
        backward: gradients of activations and weights.
        recomputed: forward passes that activation checkpointing and the pairs' head repeat.
        reference: forward passes of a reference model.
    """

    forward: float
    backward: float
    recomputed: float
    reference: float

    @property
    def useful(self) -> float:
        """What the training needs: the M of MFU."""
        return self.forward + self.backward + self.reference

    @property
    def executed(self) -> float:
        """All of it."""
        return self.useful + self.recomputed


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a step.

    Attributes:
        compute: at the assumed share of the peak, waiting for the slowest rank included.
        communication: of the slowest link, as if nothing else were done.
        update: of the optimizer.
        sent: bytes that a rank receives in a step.
    """

    compute: float
    communication: float
    update: float
    sent: float

    @property
    def step(self) -> float:
        """Communication hides behind computing, or computing behind it."""
        return max(self.compute, self.communication) + self.update


def work_of(
    network: TrainedNetwork, load: Load, *, checkpointing: bool = False, pairs: bool = False, reference: bool = False
) -> Work:
    """The work of a step.

    Blocks as `models.cost` has them; beside them the projector on tiles and the head on supervised rows. Where half of
    the last block runs on supervised rows alone, the rest of it is left out.

    Args:
        network: which parts train.
        load: of the step.
        checkpointing: whether blocks are computed again in backward.
        pairs: the head's logits are made again in backward.
        reference: a reference model runs beside the policy.
    """
    shapes = network.shapes
    token, square, tile = forward_cost(shapes)
    amounts = load.tokens, load.squares, load.tiles
    forward_blocks = _dot(amounts, (token, square, tile))
    trained = _dot(amounts, training_cost(shapes, network.trainable_parts, adapted=network.adapted))
    again = _dot(amounts, training_cost(shapes, network.trainable_parts, adapted=network.adapted, recompute=True))
    skipped = (load.tokens - load.labels) * _feed_forward(shapes) * network.selects_rows
    factor = 2.0 + ("llm" in network.full)
    projector, head = load.tiles * projector_cost(shapes), load.labels * head_cost(shapes)
    forward = forward_blocks - skipped + projector + head
    backward = trained - forward_blocks - (factor - 1) * skipped
    backward += projector * _projector_factor(network) + head * (factor - 1)
    recomputed = (again - trained - skipped) * checkpointing + head * pairs
    return Work(forward, backward, recomputed, forward * reference)


def _dot(amounts: tuple[float, float, float], costs: tuple[float, float, float]) -> float:
    return sum(amount * cost for amount, cost in zip(amounts, costs, strict=True))


def _feed_forward(shapes: InternVLConfig) -> float:
    """Operations per token of a block's feed-forward network, which has three products."""
    return 2.0 * 3 * shapes.text_config.hidden_size * shapes.text_config.intermediate_size


def _projector_factor(network: TrainedNetwork) -> int:
    """Forward passes that its backward pass costs: of what goes through it, and of its weights."""
    return ("vision" in network.trainable_parts) + ("projector" in network.full)


def pace_of(
    network: Network,
    work: Work,
    load: Load,
    layout: Layout,
    gpu: Gpu,
    *,
    mfu: float,
    network_speed: float,
    host_speed: float,
    reference: bool = False,
) -> Pace:
    """The seconds of a step.

    Args:
        network, work, load, layout: of the step.
        gpu: what a rank runs on.
        mfu: share of its peak.
        network_speed: bytes/s between nodes for each GPU.
        host_speed: bytes/s between GPU and host.
        reference: see `work_of`.
    """
    peak = gpu.float32 if layout.compute == FLOAT32 else gpu.bfloat16
    compute = work.executed / (layout.ranks * peak * mfu) / (1 - load.idle)
    inner, outer = traffic(network, layout, reference=reference)
    inside = gpu.link if layout.shards <= layout.per_node else network_speed
    between = gpu.link if layout.ranks <= layout.per_node else network_speed
    sent, trained = inner / inside + outer / between, network.whole.trained / layout.shards
    if layout.offload:
        # Shards go to the device for each pass, gradients come back; the host updates, at about the speed of its link.
        own = network.whole.stored / layout.shards
        sent += (own * passes(layout) * layout.accumulation + trained * _UPDATE_TRAFFIC) / host_speed
    update = 0.0 if layout.offload else _UPDATE_TRAFFIC * trained / gpu.memory_speed
    return Pace(compute, sent, update, inner + outer)


def passes(layout: Layout) -> int:
    """How often a micro-batch gathers the weights."""
    return 1 + layout.reshard


def traffic(network: Network, layout: Layout, *, reference: bool = False) -> tuple[float, float]:
    """Bytes that a rank receives in a step from those it shares weights with, and from those that have the same.

    Rings: a gather or a reduction over n ranks brings (n - 1) / n of the whole to each, an all-reduce twice as much.
    """
    whole, shards = network.whole, layout.shards
    copies = layout.ranks // shards
    # Backward needs nothing of a tower in which nothing trains.
    once = network.parts["vision"].total if network.vision_layers == 0 else 0
    numbers = (whole.total - once) * passes(layout) + once + whole.total * reference
    gathered = layout.compute * float(numbers) * layout.accumulation
    gradients = FLOAT32 * float(whole.trainable) if layout.sharded else whole.trained
    reductions = layout.accumulation if layout.sync_every else 1
    inner = (gathered + gradients * reductions) * (shards - 1) / shards if layout.sharded else 0.0
    # Copies agree with the last micro-batch alone.
    outer = 2 * gradients / shards * (copies - 1) / copies
    return inner, outer
