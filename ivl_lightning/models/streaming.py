"""A network on the meta device, and its weights read into it one tensor at a time, whole or this rank's shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ivl_lightning.checkpoints.source import CheckpointError, TensorSource, read_rows
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
    check_fits(model, source, described_by)
    write(model, source, device_of=device_of)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device_of(name)))


def check_fits(model: nn.Module, source: TensorSource, described_by: str) -> None:
    """Every parameter must be in the source, in its shape, and nothing else.

    Raises:
        CheckpointError: names what is missing, surplus or of another shape.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    check_complete(source, shapes, described_by)


@torch.no_grad()
def write(model: nn.Module, source: TensorSource, *, device_of: Callable[[str], torch.device] = lambda _: _CPU) -> None:
    """Put a source's tensors into the parameters of their names; of a sharded one this rank's share alone.

    Args:
        model: parameters on the meta device get memory, unless they are sharded (see `materialise`).
        source: with native names, all or some of the model's.
        device_of: where a parameter that was on the meta device shall lie.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    for name in source.names():
        old = parameter_of(model, name)
        # A copy would stretch a smaller tensor.
        assert source.meta(name).shape == old.shape, (name, source.meta(name).shape, old.shape)
        value = _share(source, name, old)
        if not old.is_meta:
            _own(old).copy_(value)
            continue
        # Always a copy: what was read may lie in the file itself.
        new = value.to(device_of(name), old.dtype, copy=True)
        owner, leaf = _owner_of(model, name)
        setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))


def is_empty(model: nn.Module) -> bool:
    """Whether parameters are still on the meta device; sharded or not."""
    return any(parameter.is_meta for parameter in model.parameters())


def materialise(root: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device memory without values, sharded ones for their shares; all else stays as it is.

    Args:
        root: what FSDP shards, if anything does: it must notice that its parameters are others.
        device: of the parameters.
    """
    root._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


@torch.no_grad()
def different(model: nn.Module, source: TensorSource) -> list[str]:
    """Names of a source's tensors that are not, bit for bit, the model's; of sharded ones this rank's share counts.

    Args:
        model: filled; may be sharded, or have adapters.
        source: with native names; values are compared in the model's type.
    """
    own = ((name, parameter_of(model, name)) for name in source.names())
    return [name for name, parameter in own if not _same(_own(parameter), _share(source, name, parameter))]


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a native name, also where adapters have wrapped its layer."""
    parameter = getattr(*_owner_of(model, name))
    assert isinstance(parameter, nn.Parameter), name
    return parameter


def _owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return getattr(module, "base_layer", module), leaf


def _same(own: Tensor, value: Tensor) -> bool:
    wanted = value.to(own.device, own.dtype)
    return own.shape == wanted.shape and torch.equal(_bits(own), _bits(wanted))


def _bits(tensor: Tensor) -> Tensor:
    """As bytes: a number that is none equals itself, and 0 is not -0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _own(parameter: Tensor) -> Tensor:
    """What lies in this rank's memory of a parameter, not copied."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _share(source: TensorSource, name: str, parameter: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds of a parameter; nothing else is read.

    Every rank has the whole at hand, so nothing is sent; and where shares lie on a GPU, no whole tensor gets there.
    """
    if not isinstance(parameter, DTensor):
        return source.read(name)
    # Of a mesh of copies and shards each copy is cut in the same way.
    (dimension,) = [number for number, placement in enumerate(parameter.placements) if placement.is_shard()]
    placement, mesh = parameter.placements[dimension], parameter.device_mesh
    assert placement == Shard(0), placement
    ranks, rank = mesh.size(dimension), mesh.get_local_rank(dimension)
    # As `torch.chunk` has it, and FSDP2: equal blocks of rows, of which the last one is short, and others may be empty.
    rows = parameter.shape[0]
    block = -(-rows // ranks)
    first = min(rank * block, rows)
    return read_rows(source, name, first, min(first + block, rows))
