"""What a forward pass keeps for backward, in bytes; derived from the library's layers, tensor by tensor.

A number that is kept twice (as the input of two products under autocast, or in float32 beside its cast) counts twice.
Weights and their casts are counted elsewhere. Checked against what autograd keeps in tests/unit/test_activations.py,
explained in docs/scale.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ivl_lightning.models.cost import attention_widths, projector_width, tile_positions
from ivl_lightning.planning.layout import FLOAT32, Layout
from ivl_lightning.planning.network import Network

_ADAPTED_MASK = 1
"""Bytes of a number's place in a dropout mask on CUDA."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one micro-batch.

    Attributes:
        vision: of all blocks of the tower, or with checkpointing of their inputs.
        projector: of the projector, and of the embeddings it is put into.
        language: of all blocks, or of their inputs.
        hidden: of the last norm, and the rows that go to the head.
        vision_block, language_block: what one block needs besides while it runs backward.
        vision_passing: what the tower needs besides in its forward pass.
    """

    vision: float
    projector: float
    language: float
    hidden: float
    vision_block: float
    language_block: float
    vision_passing: float


def kept(network: Network, layout: Layout, *, tokens: int, tiles: int, rows: int, copies: bool) -> Kept:
    """What a micro-batch keeps.

    Args:
        network: which parts train.
        layout: types and checkpointing.
        tokens, tiles, rows: of the micro-batch; rows are supervised tokens.
        copies: whether attention runs document by document, which copies its outputs once more (CPU, and float32 on
            a GPU).
    """
    shapes, e, r = network.shapes, layout.compute, layout.residual
    vision, text = shapes.vision_config, shapes.text_config
    positions = tiles * tile_positions(shapes)
    block = positions * vision_position(network, layout)
    passing = positions * (2 * e * vision.intermediate_size + (2 * r + e) * vision.hidden_size)
    own = network.vision_layers * (positions * r * vision.hidden_size if layout.checkpointing else block)
    attending, feeding = attention_half(network, layout, copies=copies), feed_forward_half(network, layout)
    language, inputs = tokens * (attending + feeding), tokens * r * text.hidden_size
    last = tokens * attending + rows * feeding if network.selects_rows else language
    predicting = rows if network.selects_rows else tokens
    slots = tiles * shapes.image_seq_length
    trained = bool(network.trainable_parts)
    return Kept(
        vision=own,
        projector=slots * _projector_token(network, layout) + 2.0 * e * text.hidden_size * slots + inputs,
        language=trained
        * (inputs * text.num_hidden_layers if layout.checkpointing else language * (text.num_hidden_layers - 1) + last),
        hidden=predicting * _norm(text.hidden_size, layout, trains="llm" in network.full) + rows * e * text.hidden_size,
        vision_block=_running(block, positions, vision, layout) if network.vision_layers else 0.0,
        language_block=_running(language, tokens, text, layout),
        vision_passing=passing,
    )


def _running(block: float, positions: float, config: object, layout: Layout) -> float:
    """Gradients of a block's largest activations, and with checkpointing what it keeps while it is computed again."""
    wide, narrow = config.intermediate_size, config.hidden_size  # type: ignore[attr-defined]  # of both configurations
    gradients = positions * (2 * layout.compute * wide + 2 * layout.residual * narrow)
    return gradients + block * layout.checkpointing


def attention_half(network: Network, layout: Layout, *, copies: bool) -> float:
    """Bytes that the attention of a block of the language model keeps for each token.

    The norm computes in float32: its input, and what its weight multiplies. Linear layers keep their input if their
    weights train. Attention keeps queries, keys, values, its output and a number per head.
    """
    text, e = network.shapes.text_config, layout.compute
    trains, width = "llm" in network.full, text.hidden_size
    queries, keys = attention_widths(network.shapes)
    fused = _is_fused(network)
    products = 3 if layout.autocast and not fused else 1
    linear = trains * e * (products * width + queries)
    # A view of the fused product keeps it whole.
    attention = e * (2 * queries + (queries + 3 * keys if fused else 2 * keys)) + FLOAT32 * text.num_attention_heads
    # Where it is not copied for the output layer, both keep the same.
    attention -= 0 if copies or not trains else e * queries
    adapters = _adapters(network, "llm", [width] * 3 + [queries])
    return _norm(width, layout, trains=trains) + linear + attention + adapters


def feed_forward_half(network: Network, layout: Layout) -> float:
    """The same of a block's norm and feed-forward network: gate, its activation, up, and if it trains their product."""
    text, e = network.shapes.text_config, layout.compute
    trains, width, wide = "llm" in network.full, text.hidden_size, text.intermediate_size
    products = 2 if layout.autocast and not _is_fused(network) else 1
    linear = trains * e * (products * width + wide)
    adapters = _adapters(network, "llm", [width] * 2 + [wide])
    return _norm(width, layout, trains=trains) + linear + 3 * e * wide + adapters


def _is_fused(network: Network) -> bool:
    """Whether one product makes queries, keys and values, and another gate and up."""
    return bool(network.shapes.text_config.model_type == "phi3")


def vision_position(network: Network, layout: Layout) -> float:
    """Bytes that a block of the tower keeps for each position of a tile; as the two halves of the language model's.

    Layer scale keeps what it multiplies if it trains; the output of attention is kept once, for itself and for the
    layer behind it.
    """
    vision, e, r = network.shapes.vision_config, layout.compute, layout.residual
    trains, width, wide = "vision" in network.full, vision.hidden_size, vision.intermediate_size
    plain = vision.norm_type == "layer_norm"
    norms = 2 * (r * width if plain else _norm(width, layout, trains=trains))
    between = 2 * _norm(width, layout, trains=trains, source=e) if vision.use_qk_norm else 0
    linear = trains * ((4 if layout.autocast else 2) * e * width + e * wide)
    scales = trains * 2 * e * width
    attention = 4 * e * width + FLOAT32 * vision.num_attention_heads
    adapters = _adapters(network, "vision", [width] * 4 + [width] + [wide])
    return norms + between + linear + scales + attention + e * wide + adapters


def _norm(width: int, layout: Layout, *, trains: bool, source: int | None = None) -> float:
    """Of an RMS norm: its input in float32, and what its weight multiplies in the type of the input."""
    source = layout.residual if source is None else source
    return FLOAT32 * width + trains * source * width


def _projector_token(network: Network, layout: Layout) -> float:
    """Of a context token: input of norm and layers, and the activation between them."""
    if not network.vision_layers and "projector" not in network.full:
        return 0.0
    trains, e = "projector" in network.full, layout.compute
    width, folded = network.shapes.text_config.hidden_size, projector_width(network.shapes)
    return e * (folded + width) + trains * e * (folded + width)


def _adapters(network: Network, part: str, inputs: list[int]) -> float:
    """Of adapters: each layer's input behind its own dropout, in float32, the mask, and the product of rank r."""
    if part not in network.adapted:
        return 0.0
    return sum((FLOAT32 + _ADAPTED_MASK) * width + FLOAT32 * network.rank for width in inputs)
