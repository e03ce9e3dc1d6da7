"""Memory of a rank, by part, at the moments of a step where it may be highest.

Weights, optimizer and what FSDP has gathered lie there throughout; activations grow in forward and go in backward,
while gradients come. So the peak is looked for at five moments, and each part is told as it is at the highest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ivl_lightning.planning.activations import Kept, kept
from ivl_lightning.planning.layout import FLOAT32, Layout
from ivl_lightning.planning.network import Count, Network

_PIXEL_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The largest micro-batch, and how its head works.

    Attributes:
        tokens, tiles: its caps.
        rows: supervised tokens at most.
        chunk_rows: rows whose logits exist at one time.
        pairs: whether log-probabilities of pairs are asked for.
        reference: a second network of the same kind in memory.
    """

    tokens: int
    tiles: int
    rows: int
    chunk_rows: int
    pairs: bool = False
    reference: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """Where a rank runs.

    Attributes:
        reserve: bytes that are taken before anything is built.
        fragmentation: share of activations that the allocator needs on top.
        cuda: a GPU; else a CPU, which runs attention document by document.
    """

    reserve: float = 0.0
    fragmentation: float = 0.0
    cuda: bool = True


@dataclass(frozen=True, slots=True)
class Memory:
    """Forecast of one rank.

    Attributes:
        moments: moment -> part -> bytes; parts that are 0 everywhere are left out.
        host: bytes of offloaded shards in the host's memory, for each rank.
    """

    moments: dict[str, dict[str, float]]
    host: float

    @property
    def peak_moment(self) -> str:
        """The moment at which most is needed."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part at that moment."""
        return self.moments[self.peak_moment]

    @property
    def peak(self) -> float:
        """Bytes at that moment."""
        return sum(self.parts.values())


def forecast_memory(network: Network, layout: Layout, batch: MicroBatch, device: Device) -> Memory:
    """What a rank needs in the middle of training, when optimizer state is there.

    Args:
        network: which parts train.
        layout: ranks and types.
        batch: the largest micro-batch.
        device: what it runs on.
    """
    copies = not device.cuda or layout.compute == FLOAT32
    activations = kept(network, layout, tokens=batch.tokens, tiles=batch.tiles, rows=batch.rows, copies=copies)
    always = _always(network, layout, batch, device)
    moments = {}
    for name, own in _moments(network, layout, batch, activations):
        parts = {**always, **own}
        moving = sum(value for part, value in own.items() if part in _ACTIVATIONS)
        parts["allocator"] = device.fragmentation * moving
        moments[name] = {part: value for part, value in parts.items() if value}
    update = {**always, **_update(network, layout, device)}
    for part in ("gathered root", "casts of weights"):
        update.pop(part, None)
    moments["optimizer step"] = {part: value for part, value in update.items() if value}
    host = (network.whole.stored + 3 * network.whole.trained) / layout.shards if layout.offload else 0.0
    return Memory(moments, host)


_ACTIVATIONS = ("ViT activations", "projector activations", "LLM activations", "logits", "running block", "pixels")


def _always(network: Network, layout: Layout, batch: MicroBatch, device: Device) -> dict[str, float]:
    whole, on_device = network.whole, 0.0 if layout.offload else 1.0
    side = network.shapes.vision_config.image_size[0]
    return {
        "weights": on_device * whole.stored / layout.shards,
        "optimizer": on_device * 2 * whole.trained / layout.shards,
        # Its shares are offloaded too.
        "reference": batch.reference * on_device * network.plain / layout.shards,
        "gathered root": _root(network, layout) * (2 if batch.reference else 1),
        "casts of weights": layout.autocast * layout.compute * float(_cast(network, layout)),
        # The batch that is trained, and the next one.
        "tiles": 2.0 * batch.tiles * _PIXEL_CHANNELS * side * side,
        "reserve": device.reserve,
        "DDP buckets": whole.trained if layout.strategy == "ddp" else 0.0,
    }


def _cast(network: Network, layout: Layout) -> int:
    """Weights whose casts autocast keeps: all, or with checkpointing those that train and one block of the others."""
    return network.whole.trainable + network.language_block.total if layout.checkpointing else network.whole.total


def _root(network: Network, layout: Layout) -> float:
    """Embeddings, head and last norm stay gathered from forward to backward, and with them what is not resharded."""
    if not layout.sharded:
        return 0.0
    if not layout.reshard:
        return layout.compute * float(network.parts["llm"].total + network.vision_block.total * network.vision_layers)
    return layout.compute * float(_outside_blocks(network).total)


def _outside_blocks(network: Network) -> Count:
    """Embeddings, head and last norm of the language model, as numbers."""
    llm, block, layers = network.parts["llm"], network.language_block, network.shapes.text_config.num_hidden_layers
    return Count(llm.total - layers * block.total, llm.trainable - layers * block.trainable)


def _moments(
    network: Network, layout: Layout, batch: MicroBatch, activations: Kept
) -> Iterator[tuple[str, dict[str, float]]]:
    whole, e = network.whole, layout.compute
    side, tiles = network.shapes.vision_config.image_size[0], batch.tiles
    # Computed in float32, then rounded.
    pixels = float(tiles * _PIXEL_CHANNELS * side * side) * (FLOAT32 + (e if e != FLOAT32 else 0))
    full = FLOAT32 * float(whole.trainable) if layout.whole_gradients else _own_gradients(network, layout)
    name = "gradients" if not layout.whole_gradients else "whole gradients"
    held = full if layout.accumulation > 1 else 0.0
    llm_share = network.parts["llm"].trained / whole.trained if whole.trained else 0.0
    vision, projector = activations.vision, activations.projector
    language = activations.language + activations.hidden
    trains_vision = network.vision_layers > 0
    pixels_kept = pixels if trains_vision else 0.0
    yield (
        "vision forward",
        {
            name: held,
            "ViT activations": vision,
            "running block": activations.vision_passing,
            "pixels": pixels,
            "gathered blocks": _gathered(network, layout, "vision", backward=False),
        },
    )
    yield (
        "loss head",
        {
            name: held,
            "ViT activations": vision,
            "projector activations": projector,
            "LLM activations": language,
            "logits": _head(network, layout, batch),
            "pixels": pixels_kept,
        },
    )
    yield (
        "language backward",
        {
            name: held,
            "ViT activations": vision,
            "projector activations": projector,
            "LLM activations": language,
            "running block": activations.language_block,
            "logits": _head_gradients(network, layout, batch),
            "pixels": pixels_kept,
            "gathered blocks": _gathered(network, layout, "llm", backward=True),
        },
    )
    if trains_vision:
        yield (
            "vision backward",
            {
                name: max(held, llm_share * full),
                "gradients of the root": _root_gradients(network, layout),
                "ViT activations": vision,
                "running block": activations.vision_block,
                "pixels": pixels_kept,
                "gathered blocks": _gathered(network, layout, "vision", backward=True),
            },
        )


def _own_gradients(network: Network, layout: Layout) -> float:
    """Reduced ones of the rank's shards; offloaded ones go to the host at once."""
    return 0.0 if layout.offload else network.whole.trained / layout.shards


def _root_gradients(network: Network, layout: Layout) -> float:
    """Those of embeddings and head are reduced last."""
    if not layout.sharded or layout.whole_gradients:
        return 0.0
    return layout.compute * float(_outside_blocks(network).trainable)


def _head(network: Network, layout: Layout, batch: MicroBatch) -> float:
    """Logits in float32, those of two chunks for a moment where there are several, and what is given back.

    `losses/next_token.py`: products in their own type, float32, the gradient in place, cast back; the gradients of
    hidden states and head are made here and kept. `losses/logps.py` makes them in backward.
    """
    cast = layout.compute if layout.compute != FLOAT32 else 0
    logits = float(_logits(network, batch) * (FLOAT32 + cast))
    return logits if batch.pairs else logits + _head_gradients(network, layout, batch)


def _logits(network: Network, batch: MicroBatch) -> int:
    """Numbers of the largest chunk, and of the next one, which comes before the first is given up."""
    chunk = min(batch.chunk_rows, batch.rows)
    return int((chunk + min(chunk, batch.rows - chunk)) * network.shapes.text_config.vocab_size)


def _head_gradients(network: Network, layout: Layout, batch: MicroBatch) -> float:
    """Of hidden states and of the head's weight; for pairs the logits once more."""
    text, cast = network.shapes.text_config, layout.compute if layout.compute != FLOAT32 else 0
    head = text.vocab_size * text.hidden_size if "llm" in network.full else 0
    given = layout.compute * float(batch.rows * text.hidden_size + head)
    return given + (_logits(network, batch) * float(FLOAT32 + cast) if batch.pairs else 0.0)


def _gathered(network: Network, layout: Layout, part: str, *, backward: bool) -> float:
    """Blocks that are whole: the one that runs, and those gathered ahead; in backward the gradients of one too."""
    if not layout.sharded:
        return 0.0
    block = network.vision_block if part == "vision" else network.language_block
    ahead = max(layout.prefetch, 1)
    gathered = layout.compute * float(block.total) * (1 + ahead)
    # As computed, and in float32 for the reduction, one behind the other.
    return gathered + backward * (layout.compute + FLOAT32) * float(block.trainable) * (not layout.whole_gradients)


def _update(network: Network, layout: Layout, device: Device) -> dict[str, float]:
    """Gradients of the rank, and intermediate results of the tensor that is updated."""
    whole = network.whole
    trained = whole.trained / layout.shards
    if layout.offload:
        return {}
    return {
        "gradients": trained,
        # On a GPU one kernel updates everything in place.
        "optimizer temporaries": 0.0 if device.cuda else 2.0 * FLOAT32 * whole.largest / layout.shards,
    }
