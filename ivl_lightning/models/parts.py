"""Typed access to the parts of an InternVL model, which the library declares as `Tensor | Module` or as optional."""

from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, PreTrainedConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionModel


def vision_tower(model: InternVLForConditionalGeneration) -> InternVLVisionModel:
    """The ViT."""
    tower = model.model.vision_tower
    assert isinstance(tower, InternVLVisionModel)
    return tower


def vision_layers(tower: InternVLVisionModel) -> nn.ModuleList:
    """Its blocks, first to last."""
    return tower.encoder.layer


def language_layers(model: InternVLForConditionalGeneration) -> nn.ModuleList:
    """The language model's blocks, first to last."""
    layers = model.model.language_model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def vision_config(config: InternVLConfig) -> InternVLVisionConfig:
    """The ViT's configuration."""
    assert isinstance(config.vision_config, InternVLVisionConfig)
    return config.vision_config


def text_config(config: InternVLConfig) -> PreTrainedConfig:
    """The language model's configuration."""
    assert isinstance(config.text_config, PreTrainedConfig)
    return config.text_config


def tile_size(config: InternVLConfig) -> int:
    """Side of a tile in pixels."""
    return _side(vision_config(config).image_size)


def patch_size(config: InternVLConfig) -> int:
    """Side of a ViT patch in pixels."""
    return _side(vision_config(config).patch_size)


def set_image_size(config: InternVLConfig, side: int) -> None:
    """Make tiles `side` pixels wide, and the count of their context tokens agree, in place."""
    vision = vision_config(config)
    vision.image_size = [side, side]
    tokens = int(side // patch_size(config) * config.downsample_ratio)
    config.image_seq_length = tokens * tokens


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]
