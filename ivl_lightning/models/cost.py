"""The work a sample costs, from the model's shapes: what packs are grouped by, so that ranks finish together."""

from __future__ import annotations

from collections.abc import Collection

from transformers import InternVLConfig

from ivl_lightning.config.schema import Part


def training_cost(
    config: InternVLConfig, trainable: Collection[Part], *, adapted: Collection[Part] = (), recompute: bool = False
) -> tuple[float, float, float]:
    """`forward_cost` with the backward pass: what ranks that work side by side wait for.

    The gradient of what a part gives costs as much as its forward pass, that of its weights once more. A frozen vision
    tower needs neither; through a frozen language model the gradient still has to pass where something before it
    trains. Through a part with adapters it has to pass as well, and those of the small matrices cost next to nothing.

    Args:
        config: shapes of the network.
        trainable: parts that train.
        adapted: those of them that train through LoRA adapters.
        recompute: activation checkpointing repeats the forward pass of what has a backward pass.
    """
    token, square, tile = forward_cost(config)
    full = set(trainable) - set(adapted)
    language = 2 + ("llm" in full) + recompute
    vision = 2 + ("vision" in full) + recompute if "vision" in trainable else 1
    return token * language, square * language, tile * vision


def forward_cost(config: InternVLConfig) -> tuple[float, float, float]:
    """Floating-point operations of a forward pass per token, per squared document length, and per tile.

    Two for each weight a token meets, 2 n d per layer for the causal half of the two attention products over n
    positions of d channels, and the vision tower with its full attention. The head is left out: it runs on supervised
    positions only. For InternVL 2.5 1B these are about 0.72e9, 4.3e4 and 0.72e12; for 8B 14.0e9, 2.6e5 and 0.72e12.

    Args:
        config: shapes of the network.
    """
    text = config.text_config
    attention_width, key_value_width = attention_widths(config)
    attention = 2 * text.hidden_size * attention_width + 2 * text.hidden_size * key_value_width
    feed_forward = 3 * text.hidden_size * text.intermediate_size
    weights = text.num_hidden_layers * (attention + feed_forward)
    return 2.0 * weights, 2.0 * text.num_hidden_layers * attention_width, _tile_cost(config)


def _tile_cost(config: InternVLConfig) -> float:
    vision = config.vision_config
    positions = tile_positions(config)
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    per_layer = 2 * layer * positions + 4 * vision.hidden_size * positions**2
    return float(vision.num_hidden_layers * per_layer)


def projector_cost(config: InternVLConfig) -> float:
    """Floating-point operations of the projector's forward pass per tile: two linear layers on each of its tokens."""
    width, folded = config.text_config.hidden_size, projector_width(config)
    return 2.0 * config.image_seq_length * (folded * width + width * width)


def projector_width(config: InternVLConfig) -> int:
    """Channels that the projector takes: those of the patches that become one token."""
    return int(config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2)


def head_cost(config: InternVLConfig) -> float:
    """Floating-point operations of the output head's forward pass per supervised token."""
    return 2.0 * config.text_config.hidden_size * config.text_config.vocab_size


def tile_positions(config: InternVLConfig) -> int:
    """Positions of a tile in the vision tower: its patches and the class token."""
    (height, width), (patch_height, patch_width) = config.vision_config.image_size, config.vision_config.patch_size
    return int((height // patch_height) * (width // patch_width) + 1)


def attention_widths(config: InternVLConfig) -> tuple[int, int]:
    """Channels of the queries of a layer of the language model, and of its keys."""
    text = config.text_config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return head_size * text.num_attention_heads, head_size * text.num_key_value_heads
