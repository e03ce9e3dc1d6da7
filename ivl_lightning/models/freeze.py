"""What trains: the three parts of the model, switched on and off, and shown as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from ivl_lightning.config.schema import Part
from ivl_lightning.models.parts import vision_layers, vision_tower


@dataclass(frozen=True, slots=True)
class PartSize:
    """Parameters of one part of the model."""

    name: Part
    total: int
    trainable: int


def model_parts(model: InternVLForConditionalGeneration) -> dict[Part, tuple[nn.Module, ...]]:
    """The modules of each part; the output head belongs to the language model."""
    inner = model.model
    return {
        "vision": (inner.vision_tower,),
        "projector": (inner.multi_modal_projector,),
        "llm": (inner.language_model, model.lm_head),
    }


def set_trainable(
    model: InternVLForConditionalGeneration, parts: Iterable[Part], *, last_vision_layers: int | None = None
) -> None:
    """Give gradients to `parts` and to nothing else.

    Args:
        model: changed in place.
        parts: of `vision`, `projector`, `llm`.
        last_vision_layers: train only the last n layers of a trainable vision tower.

    Raises:
        ValueError: an unknown part, no part, or more vision layers than there are.
    """
    known = model_parts(model)
    wanted = set(parts)
    if not wanted or wanted - set(known):
        raise ValueError(f"stage.trainable={sorted(wanted)} must name one or more of {', '.join(known)}")
    for name, modules in known.items():
        for module in modules:
            module.requires_grad_(name in wanted)
    if last_vision_layers is not None and "vision" in wanted:
        _keep_last_layers(vision_tower(model), last_vision_layers)


def _keep_last_layers(tower: InternVLVisionModel, count: int) -> None:
    layers = vision_layers(tower)
    if not 0 < count <= len(layers):
        raise ValueError(f"stage.trainable_vision_layers={count}, but the vision tower has {len(layers)} layers")
    tower.requires_grad_(False)
    layers[-count:].requires_grad_(True)


def frozen_modules(model: InternVLForConditionalGeneration) -> list[nn.Module]:
    """The largest modules without a trainable parameter; they are kept in eval mode."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            found.append(module)
            return
        for child in module.children():
            # A child without parameters (a dropout) takes part in whatever its parent does.
            if next(child.parameters(), None) is not None:
                visit(child)

    visit(model)
    return found


def part_sizes(model: InternVLForConditionalGeneration) -> list[PartSize]:
    """Parameters of each part, all and trainable."""
    return [_part_size(name, modules) for name, modules in model_parts(model).items()]


def _part_size(name: Part, modules: tuple[nn.Module, ...]) -> PartSize:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return PartSize(name, sum(_count(parameter) for parameter in parameters), trainable)


def _count(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for: a byte of a 4-bit one holds two, and its state knows their shape."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
