"""Loaders of a stage's network, and writing tensors into it: each rank's rows, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ivl_lightning.checkpoints.source import MemorySource
from ivl_lightning.config.schema import LoraSettings, ModelConfig
from ivl_lightning.models.loader import ConfiguredNetwork, ReadyNetwork
from ivl_lightning.models.streaming import different, write
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from tests import originals, tiny


@contextmanager
def rank_of(ranks: int, rank: int) -> Iterator[None]:
    """One rank alone: whatever it sends goes nowhere, so it may send nothing."""
    init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        destroy_process_group()


def sharded(rows: int, ranks: int) -> nn.Module:
    """A layer whose weight `[rows, 3]` is sharded; this rank's share is 0."""
    mesh = init_device_mesh("cpu", (ranks,))
    own = len(share(torch.empty(rows, 3), ranks, mesh.get_local_rank()))
    local = DTensor.from_local(torch.zeros(own, 3), mesh, [Shard(0)], shape=torch.Size((rows, 3)), stride=(3, 1))
    layer = nn.Linear(3, rows, bias=False)
    layer.weight = nn.Parameter(local)
    return layer


def share(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """`torch.chunk` makes as few blocks as will do: 1 of 1 row, 2 of 4 rows for 3 ranks."""
    chunks = whole.chunk(ranks)
    return chunks[rank] if rank < len(chunks) else whole[:0]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_of_three_gets_its_rows(rows, rank):
    """Row i of n goes to rank i // ceil(n / 3), in another type too; ranks behind the last row hold nothing."""
    whole = torch.arange(3.0 * rows, dtype=torch.float64).view(rows, 3)
    source = MemorySource({"weight": whole})
    with rank_of(3, rank):
        layer = sharded(rows, 3)
        write(layer, source)
        own = layer.weight.to_local()
        assert own.dtype is torch.float32
        assert torch.equal(own, share(whole, 3, rank).float())
        assert own.tolist() == [row for number, row in enumerate(whole.tolist()) if number // -(-rows // 3) == rank]
        assert different(layer, source) == []
        if own.numel():
            own.data[-1, -1] += 1
            assert different(layer, source) == ["weight"]


def test_what_is_the_same_is_so_to_the_bit():
    """A number that is none arrives as well; 0 and -0 are equal numbers, but not the same."""
    layer = nn.Linear(2, 1, bias=False)
    source = MemorySource({"weight": torch.tensor([[float("nan"), 0.0]])})
    write(layer, source)
    assert different(layer, source) == []
    layer.weight.data[0, 1] = -0.0
    assert different(layer, source) == ["weight"]


@pytest.mark.parametrize("trains", [True, False])
def test_what_gets_memory_goes_on_training_or_not(trains):
    with torch.device("meta"):
        layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    layer.requires_grad_(trains)
    write(layer, MemorySource({"weight": torch.ones(1, 2)}))
    assert layer.weight.requires_grad is trains
    assert layer.weight.dtype is torch.bfloat16


def test_what_is_written_is_no_part_of_the_file():
    """Training changes the network and never the weights that were read."""
    read = torch.ones(1, 2)
    with torch.device("meta"):
        layer = nn.Linear(2, 1, bias=False)
    write(layer, MemorySource({"weight": read}))
    layer.weight.data.zero_()
    assert read.sum() == 2


def test_a_network_without_memory_is_refused(tmp_path: Path):
    """Nobody would fill it: the trainer would train whatever lies in memory."""
    folder = originals.write_family(tmp_path / "qwen2", "qwen2_300m")
    empty = ConfiguredNetwork(ModelConfig(path=str(folder)), tiny.load_tiny_tokenizer()).build()
    with pytest.raises(ValueError, match=r"no memory for lm_head\.weight, .* and \d+ more: give one that has its"):
        ReadyNetwork(lambda: empty).build()


def test_a_ready_network_is_not_built_anew(tmp_path: Path):
    """Neither where it comes in a loader: what it began with cannot be had again."""
    tokenizer = tiny.load_tiny_tokenizer()
    network = tiny.build_tiny_model(tokenizer)
    assert not ReadyNetwork(network).builds_anew
    assert ReadyNetwork(lambda: network).builds_anew
    assert ConfiguredNetwork(tiny.tiny_config(), tokenizer).builds_anew
    with pytest.raises(ValueError, match="with a ready network"):
        InstructionTuning(ReadyNetwork(network), lora=LoraSettings(parts=["llm"], quantize="nf4"))
