"""Which modules are sharded units, and which of them a backward pass needs."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from ivl_lightning.checkpoints.source import MemorySource
from ivl_lightning.models.freeze import set_trainable
from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower
from ivl_lightning.models.shard import shard_model, sharded_units, sharding_mesh
from ivl_lightning.models.streaming import write
from ivl_lightning.stages.root import InternVLRoot
from tests.unit.test_loader import rank_of


def own_parameters(module: torch.nn.Module, others: list[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    inside = {parameter for other in others if other is not module for parameter in other.parameters()}
    return {name: value for name, value in module.named_parameters() if value not in inside}


@pytest.mark.parametrize(
    ("trainable", "last_vision_layers"),
    [(["projector"], None), (["vision", "projector"], None), (["vision", "projector"], 1), (["llm"], None)],
)
def test_no_unit_mixes_frozen_and_trained_weights(model, trainable, last_vision_layers):
    """Two blocks each side, tower, projector; the root keeps embeddings, output head and the last norm."""
    set_trainable(model, trainable, last_vision_layers=last_vision_layers)
    root, units = InternVLRoot(model), sharded_units(model)
    with rank_of(2, 0):
        shard_model(root, model, init_device_mesh("cpu", (2,)))
        found = [module for module in root.modules() if isinstance(module, FSDPModule)]
        assert set(found) == {root, *units}
        assert len(units) == 2 + 2 + 2
        for unit in found:
            inner = [other for other in found if other is not unit and other in set(unit.modules())]
            own = own_parameters(unit, inner)
            assert own
            assert len({parameter.requires_grad for parameter in own.values()}) == 1
            assert all(isinstance(parameter, DTensor) for parameter in own.values())
        kept = own_parameters(root, units)
        assert {name.rpartition("internvl.")[2] for name in kept} == {
            "model.language_model.embed_tokens.weight",
            "model.language_model.norm.weight",
            "lm_head.weight",
        }


def test_a_frozen_tower_is_freed_whatever_the_setting(model):
    """Backward ends at the projector, or at the first block that trains."""
    set_trainable(model, ["vision", "projector"], last_vision_layers=1)
    root = InternVLRoot(model)
    with rank_of(2, 0):
        shard_model(root, model, init_device_mesh("cpu", (2,)), reshard_after_forward=False, prefetch=1)
        first, last = vision_layers(vision_tower(model))
        frees = {unit: freed_after_forward(unit) for unit in (first, last, *language_layers(model))}
    assert list(frees.values()) == [True, False, False, False]


def freed_after_forward(unit: FSDPModule) -> bool:
    return unit._get_fsdp_state()._fsdp_param_group._reshard_after_forward


def test_copies_and_shards_are_cut_alike(model):
    """Four ranks, two copies of two shards: each tensor lies on ranks 0 and 2 in its first half, on 1 and 3 in the
    second, and a file's tensor is read so.
    """
    whole = {name: value.detach().clone() for name, value in model.named_parameters()}
    with rank_of(4, 3):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        assert sharding_mesh(mesh) is mesh
        root = InternVLRoot(model)
        shard_model(root, model, mesh)
        write(model, MemorySource({name: value + 1.0 for name, value in whole.items()}))
        for name, parameter in model.named_parameters():
            assert parameter.placements == (Replicate(), Shard(0))
            chunks = whole[name].chunk(2)
            wanted = chunks[1] if len(chunks) == 2 else whole[name][:0]
            assert torch.equal(parameter.to_local(), wanted + 1.0), name


def test_a_mesh_of_lightning_is_one_dimension_of_it():
    with rank_of(2, 0):
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        assert sharding_mesh(mesh).ndim == 1
        assert sharding_mesh(mesh).size() == 2
