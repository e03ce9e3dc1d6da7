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

from ivl_lightning.checkpoints.source import Combined, MemorySource, read_rows, renamed
from ivl_lightning.checkpoints.views import AsNative
from ivl_lightning.config.schema import LoraSettings, ModelConfig
from ivl_lightning.models.checkpoint import table_of
from ivl_lightning.models.loader import ConfiguredNetwork, ReadyNetwork
from ivl_lightning.models.original_config import from_original
from ivl_lightning.models.streaming import different, is_empty, write
from ivl_lightning.models.vocabulary import GrownVocabulary
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from ivl_lightning.stages.mixed_preference import MixedPreference
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


@pytest.mark.parametrize("family", ["internlm2_6b", "qwen2_300m", "phi3_300m"])
def test_rows_of_any_tensor_are_read_alone(family):
    """Those of the whole, whatever tensor of the original they lie in: parts of InternLM2's wqkv and of the tower's
    qkv, and a vocabulary's old and new rows.
    """
    config = originals.family_config(family)
    tensors = originals.random_tensors(originals.shapes(config), 0)
    table = table_of(from_original(config, Path("config.json")))
    native = Combined([renamed(AsNative(MemorySource(tensors), table), lambda name: name)])
    source = GrownVocabulary(native, config["llm_config"]["vocab_size"] + 3, std=0.02, seed=0)
    for name in source.names():
        whole, rows = source.read(name), source.meta(name).shape[0]
        for start, stop in ((0, rows), (0, 0), (rows // 3, rows // 2), (rows - 1, rows), (rows, rows)):
            assert torch.equal(read_rows(source, name, start, stop), whole[start:stop]), (name, start, stop)


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


def test_a_network_does_not_depend_on_where_tensors_are_made(tmp_path: Path):
    """Lightning makes tensors on the device of the rank, for which the meta device stands here: new vocabulary
    rows, and all rows of a random network, have the numbers of their seed.
    """
    family = originals.family_config("qwen2_300m")
    family["llm_config"]["vocab_size"] = 440
    tensors = originals.random_tensors(originals.shapes(family))
    folder = originals.write_folder(tmp_path / "qwen2", family, tensors, "qwen2_vit300m")
    for config in (ModelConfig(path=str(folder)), tiny.tiny_config()):
        networks = []
        for place in ("cpu", "meta"):
            loader = ConfiguredNetwork(config, tiny.load_tiny_tokenizer(), seed=4)
            with torch.device(place):
                networks.append(loader.build())
                loader.fill(networks[-1])
        wanted, ours = (network.state_dict() for network in networks)
        assert len(wanted["lm_head.weight"]) == 445
        assert all(torch.equal(ours[name], value) for name, value in wanted.items())


class Counting(ConfiguredNetwork):
    """Counts how often weights are read."""

    reads = 0

    def fill(self, model) -> None:
        self.reads += 1
        super().fill(model)


LLM = LoraSettings(parts=["llm"], rank=2)


@pytest.mark.parametrize(
    ("kind", "options", "reads", "awaits", "origins"),
    [
        (InstructionTuning, {}, 0, True, False),
        (InstructionTuning, {"lora": LLM}, 1, False, True),
        (MixedPreference, {"reference": "online"}, 1, True, True),
        (MixedPreference, {"reference": "cached", "weights_id": str}, 0, True, True),
        (MixedPreference, {"reference": "cached"}, 1, False, True),
        (MixedPreference, {"reference": "adapter_off", "lora": LLM}, 1, False, True),
    ],
)
def test_what_a_checkpoint_brings_is_not_read_before(tmp_path: Path, kind, options, reads, awaits, origins):
    """A checkpoint of adapters leaves out the base; a reference model has the first weights, or is known by them.

    Not told that it is resumed, each stage reads once for the policy, and once for a reference model in memory.
    """
    folder = originals.write_family(tmp_path / "qwen2", "qwen2_300m")
    loaders = [Counting(ModelConfig(path=str(folder)), tiny.load_tiny_tokenizer()) for _ in range(2)]
    fresh, resumed = (kind(loader, **options) for loader in loaders)
    resumed.resumed = True
    for stage in (fresh, resumed):
        stage.configure_model()
        assert not is_empty(stage.root)
    assert [loader.reads for loader in loaders] == [2 if options.get("reference") == "online" else 1, reads]
    assert (resumed.awaits_checkpoint, resumed.reads_origins) == (awaits, origins)
    assert (fresh.awaits_checkpoint, fresh.reads_origins) == (False, True)
    checkpoint = {"state_dict": fresh.state_dict()}
    fresh.on_save_checkpoint(checkpoint)
    if awaits:
        with pytest.raises(ValueError, match=r"told that it is resumed, .* no checkpoint was loaded: give ckpt_path"):
            resumed.on_train_start()
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])
    assert not resumed.awaits_checkpoint
    wanted = fresh.internvl.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.internvl.state_dict().items())
