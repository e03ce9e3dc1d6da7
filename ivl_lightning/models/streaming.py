"""A network on the meta device, and its weights read into it one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ivl_lightning.checkpoints.source import CheckpointError, TensorSource
from ivl_lightning.checkpoints.views import check_complete
from ivl_lightning.models.projector import choose_projector

_CPU = torch.device("cpu")


def empty_model(
    config: InternVLConfig, *, dtype: torch.dtype, attention: dict[str, str], described_by: str = "the configuration"
) -> InternVLForConditionalGeneration:
    """The network without memory for its weights.

    Args:
        config: its shapes.
        dtype: of its parameters.
        attention: implementation of each part, by transformers' names.
        described_by: where the configuration is from, for messages.

    Raises:
        CheckpointError: no network can be built from these values.
    """
    # Buffers get their values: no checkpoint holds them (rotary frequencies, scales of embeddings).
    try:
        with init_empty_weights(include_buffers=False):
            model = InternVLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # whatever the library stumbles over, a value that makes no sense is the cause
        raise CheckpointError(f"{described_by}: no network can be built from it: {error!r}") from error
    choose_projector(model)
    return model


def fill(
    model: InternVLForConditionalGeneration,
    source: TensorSource,
    *,
    described_by: str,
    device_of: Callable[[str], torch.device] = lambda _: _CPU,
) -> None:
    """Read every parameter of a model on the meta device, in place; memory beyond the model's is one tensor's.

    Args:
        model: from `empty_model`.
        source: with native names.
        described_by: the configuration, for messages.
        device_of: where the parameter of this name shall lie.

    Raises:
        CheckpointError: a missing or surplus tensor, one of another shape, or one that cannot be read.
    """
    parameters = dict(model.named_parameters())
    check_complete(source, {name: tuple(value.shape) for name, value in parameters.items()}, described_by)
    for name in source.names():
        old = parameters[name]
        # Always a copy: what was read may lie in the file itself.
        value = source.read(name).to(device_of(name), old.dtype, copy=True)
        _replace(model, name, nn.Parameter(value, requires_grad=old.requires_grad))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device_of(name)))


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
