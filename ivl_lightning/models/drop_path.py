"""Stochastic depth for the vision tower.

transformers' vision layer has none; InternVL trains with 0.1 (300M tower) or 0.4 (6B). Source: official
`modeling_intern_vit.py`: rates rise linearly from 0 at the first layer, each sample draws its own, both residual
branches of a layer draw independently.
"""

import torch
from torch import Tensor, nn
from transformers import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer, InternVLVisionModel

from ivl_lightning.models.parts import vision_layers


class DropPath(nn.Module):
    """Zeroes a residual branch for a random share of the samples and scales the rest up; identity in eval mode."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Args: branch `[N, ...]`; one draw per leading index."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        return branch * torch.empty(shape, dtype=branch.dtype, device=branch.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rate={self.rate:.4f}"


class StochasticDepthLayer(InternVLVisionLayer):
    """The library's layer with drop path on both branches; its state dict is unchanged.

    Drop path sits where the library has a dropout: at the end of the attention and of the MLP. Layer scale comes
    after it in the attention branch and before it in the MLP branch, which is the same, since a per-sample factor
    commutes with it.
    """

    def __init__(self, config: InternVLVisionConfig, rate: float) -> None:
        super().__init__(config)
        self.attention.add_module("projection_dropout", _followed(self.attention.projection_dropout, rate))
        self.add_module("dropout", _followed(self.dropout, rate))


def _followed(dropout: nn.Module, rate: float) -> nn.Sequential:
    return nn.Sequential(dropout, DropPath(rate))


def apply_drop_path(vision_tower: InternVLVisionModel, rate: float) -> None:
    """Exchange the tower's layers in place; parameters stay the same objects. A rate of 0 changes nothing.

    Raises:
        ValueError: the rate is outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"stage.drop_path_rate={rate} must be at least 0 and below 1")
    if rate == 0.0:
        return
    layers = vision_layers(vision_tower)
    for index, layer_rate in enumerate(torch.linspace(0, rate, len(layers)).tolist()):
        with torch.device("meta"):
            layer = StochasticDepthLayer(vision_tower.config, layer_rate)
        for name, parameter in list(layers[index].named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, parameter)
        layer.train(layers[index].training)
        layers[index] = layer
