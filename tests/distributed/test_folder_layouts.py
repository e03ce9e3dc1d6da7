"""Networks that ranks read from a folder, each its shares: weights, losses and lineage of one process; less memory.

On gloo ranks; cases in `folder_cases`.
"""

import shutil
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from ivl_lightning.checkpoints.fingerprint import fingerprint
from ivl_lightning.models.build import load_model
from ivl_lightning.models.checkpoint import EMBEDDINGS, HEAD
from tests.distributed import folder_cases, memory_cases
from tests.distributed.running import run_cases

TOWER = "model.vision_tower."
NETWORKS = ("original", "hf")
READ = [f"{network}/folder" for network in NETWORKS]
LARGE = [*(f"fsdp/large/{what}" for what in memory_cases.WHAT), "hsdp/large/memory"]
SPOILT = [f"{strategy}/donor/spoilt" for strategy in ("ddp", "fsdp")]
CARRIED = ["single/donor/whole", "ddp/donor/whole", "fsdp/donor/kept"]
CASES = {
    1: [*(f"single/{case}" for case in READ), "single/original/lora", CARRIED[0]],
    2: [
        # What the library imports when it is first used is no part of what is measured; the last case deletes a donor.
        *(*(f"fsdp/{case}" for case in READ), *LARGE, "fsdp/original/function", "fsdp/hf/bfloat16"),
        "fsdp/original/lora",
        *(*CARRIED[1:], *SPOILT, "fsdp/donor/touched", "fsdp/donor/resume"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    folder_cases.write_networks(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def results(folder):
    """What each case gave, by its name."""
    return run_cases("folder_cases", folder, CASES, timeout=180)


def check_same(ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names and bits."""
    assert ours.keys() == wanted.keys()
    for name, value in ours.items():
        assert value.dtype == wanted[name].dtype, name
        assert torch.equal(value, wanted[name]), name


# -- weights and losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_shares_are_those_of_the_whole(folder, results, network):
    """Gathered, what two ranks have read is what one process reads, to the bit; a function's network has the same.

    Of the rows of a tensor two ranks hold the first and the second half, if there are an even number, else one has a
    row more; of one row (class token, positions) the second rank holds nothing.
    """
    ours = results[f"fsdp/{network}/folder"]["weights"]
    assert {value.shape[0] % 2 for value in ours.values()} == {0, 1}
    check_same(ours, results[f"single/{network}/folder"]["weights"])
    plain = dict(load_model(folder / network).named_parameters())
    grown = (EMBEDDINGS, HEAD) if network == "original" else ()
    check_same(
        {name: value[: len(plain[name])] if name in grown else value for name, value in ours.items()},
        {name: value.detach() for name, value in plain.items()},
    )
    if network == "original":
        check_same(ours, results["fsdp/original/function"]["weights"])


@pytest.mark.parametrize("case", ["single/original/folder", "fsdp/original/folder"])
def test_a_vocabulary_grows_alike(results, case):
    """From 440 to 445 rows, the second rank's share among them: new output rows are the mean of the old ones, new input
    rows random with the library's spread of 0.02, the same on every rank.
    """
    weights, old = results[case]["weights"], folder_cases.SMALL_VOCABULARY
    embeddings, head = weights[EMBEDDINGS], weights[HEAD]
    assert len(embeddings) == len(head) == 445
    torch.testing.assert_close(head[old:], head[:old].mean(0).expand(5, -1), atol=1e-6, rtol=0)
    assert 0.01 < embeddings[old:].std() < 0.03


def test_weights_are_stored_in_their_type(folder, results):
    """float32 files, bfloat16 shares: each number rounded once."""
    plain = load_model(folder / "hf", dtype=torch.bfloat16)
    check_same(
        results["fsdp/hf/bfloat16"]["weights"], {name: value.detach() for name, value in plain.named_parameters()}
    )


@pytest.mark.parametrize("case", ["fsdp/original/folder", "fsdp/hf/folder", "fsdp/hf/bfloat16", "ddp/donor/whole"])
def test_buffers_are_those_of_a_network_built_with_memory(folder, results, case):
    """No checkpoint holds them (rotary frequencies): building must have made them, on every rank and in their type."""
    config = load_model(folder / ("original" if "original" in case else "hf")).config
    dtype = torch.bfloat16 if case.endswith("bfloat16") else torch.float32
    wanted = dict(InternVLForConditionalGeneration._from_config(config, dtype=dtype).named_buffers())
    assert wanted
    for buffers in results[case]["buffers"]:
        check_same(buffers, wanted)


@pytest.mark.parametrize("network", NETWORKS)
def test_losses_and_gradients_are_those_of_one_process(results, network):
    """Of two steps, with drop path and recomputed blocks; those of a network that a function built to the bit."""
    ours, wanted = results[f"fsdp/{network}/folder"], results[f"single/{network}/folder"]
    assert len(ours["losses"]) == folder_cases.STEPS
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    assert ours["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        torch.testing.assert_close(gradient, wanted["gradients"][name], atol=1e-6, rtol=1e-4, msg=name)
    if network == "original":
        built = results["fsdp/original/function"]
        assert ours["losses"] == built["losses"]
        check_same(ours["gradients"], built["gradients"])


def test_modes_are_those_of_a_network_built_with_memory(results):
    """What trains, and what is in train mode, does not depend on where the network comes from: the tower's last layer
    and all behind it.
    """
    wanted = results["fsdp/original/function"]["modes"][0]
    training, trained = wanted
    assert any(name.startswith(f"{TOWER}encoder.layer.1.") for name in trained)
    frozen = (f"{TOWER}encoder.layer.0.", f"{TOWER}embeddings")
    assert not any(name.startswith(frozen) for name in (*training, *trained))
    for case in ("single/original/folder", "fsdp/original/folder"):
        assert all(modes == wanted for modes in results[case]["modes"]), case


def test_embeddings_and_head_of_one_tensor_are_two(results):
    """Of the same numbers, on both ranks; they train apart, as in every release."""
    weights = results["fsdp/hf/folder"]["weights"]
    assert torch.equal(weights[EMBEDDINGS], weights[HEAD])
    assert not torch.equal(*(results["fsdp/original/folder"]["weights"][name] for name in (EMBEDDINGS, HEAD)))


def test_adapters_come_before_the_weights(results):
    """They are made beside a network without memory, which is sharded, and then filled: to the bit what one process
    has, and the base that of a network without adapters. Losses and gradients of two steps to 1e-6.
    """
    ours, wanted = results["fsdp/original/lora"], results["single/original/lora"]
    check_same(ours["weights"], wanted["weights"])
    plain = {
        name.replace(".base_layer.", "."): value for name, value in ours["weights"].items() if ".lora_" not in name
    }
    check_same(plain, results["single/original/folder"]["weights"])
    first = [value for name, value in ours["weights"].items() if ".lora_A." in name]
    assert len(first) == 2 * (6 + 7)
    assert all(0.0 < value.abs().max() <= value.shape[1] ** -0.5 for value in first), "uniform, as peft draws them"
    assert ours["modes"] == wanted["modes"] * 2
    assert len(ours["losses"]) == folder_cases.STEPS
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    assert ours["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        torch.testing.assert_close(gradient, wanted["gradients"][name], atol=1e-6, rtol=1e-4, msg=name)


# -- memory -------------------------------------------------------------------------------------------------------

WHOLE = 190.9e6


@pytest.mark.parametrize("case", LARGE)
def test_a_rank_holds_its_share_and_little_more(results, case):
    """190 MB on two ranks, under HSDP those of one copy: while the network is built, sharded and filled, a rank's own
    memory grows by its share of 95 MB (of two networks with a reference model), and at no time by a quarter of the
    model more; a third where the checkpoint's reader and the rest of the start are counted too. Who held the whole
    would hold half of it more.
    """
    share = WHOLE / 2 * (2 if case.endswith("online") else 1)
    for rank in results[case]["memory"]:
        assert rank["share"] == pytest.approx(share, rel=0.01)
        assert 0.9 * share < rank["grown"] < share + WHOLE * (1 / 3 if case.endswith("resumed") else 1 / 4)


@pytest.mark.parametrize("case", LARGE)
def test_a_rank_reads_its_rows_of_the_file(results, case):
    """Pages of the file that a rank has looked at: half of it, queries, keys and values in one tensor too, and at most
    2 MB more for each of its 20 tensors, since the kernel hands out pages in blocks. A reference model reads the same
    ones. Whoever goes on from a checkpoint reads none.
    """
    for rank in results[case]["memory"]:
        if case.endswith("resumed"):
            assert rank["mapped"] < 1e6
        else:
            assert 0.9 * WHOLE / 2 < rank["mapped"] < WHOLE * 3 / 4


def test_all_ways_lead_to_the_same_weights(folder, results):
    """To the bit those that one process reads: beside adapters, in policy and reference model, from a checkpoint."""
    wanted = memory_cases.plain_hash(load_model(folder / "large"))
    for case in LARGE:
        assert results[case]["hashes"] == [wanted] * (2 if case.endswith("online") else 1), case


def test_shards_have_the_fingerprint_of_the_whole(folder, results):
    """A checkpoint of adapters goes on beside a base that is sharded otherwise, or not at all."""
    wanted = fingerprint(load_model(folder / "large").named_parameters())
    assert results["fsdp/large/lora"]["prints"] == [wanted, wanted]


# -- progressive scaling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CARRIED)
def test_a_donor_s_tower_arrives_in_every_layout(folder, results, case):
    """Gathered, to the bit that of the donor's file; the projector too, which fits; the language model stays.

    Hashes in lineage.json are those of one process, before and after: the tower was frozen. Under FSDP what a last
    validation has gathered in bfloat16 is not taken for the weights.
    """
    assert set(results[case]["errors"]) == {""}
    donor, own = (dict(load_model(folder / name).named_parameters()) for name in ("donor-single", "hf"))
    for name, value in results[case]["weights"].items():
        source = donor if name.startswith((TOWER, "model.multi_modal_projector.")) else own
        assert torch.equal(value, source[name]), name
    ours, wanted = results[case]["lineage"], results[CARRIED[0]]["lineage"]
    assert ours["vision"] == [wanted["vision"][0]] * 2
    assert ours["projector"][0] == wanted["projector"][0] != ours["projector"][1]
    donor_name = f"donor-{case.partition('/')[0]}"
    assert ours["origins"] == [("hf", ["llm"], False), (donor_name, ["vision", "projector"], True)]


def test_a_sharded_stage_goes_on_when_its_donor_is_gone(folder, results):
    """Behind step 1 in a new stage, from the shards alone: the loss, hashes and origins of the run that went on."""
    ours, whole = results["fsdp/donor/resume"], results["fsdp/donor/kept"]
    assert not (folder / "donor-fsdp").exists()
    assert set(ours["errors"]) == {""}
    assert ours["losses"] == whole["losses"][1:]
    assert ours["lineage"] == whole["lineage"]


@pytest.mark.parametrize("case", SPOILT)
def test_all_ranks_stop_where_one_has_read_something_else(results, case):
    """The second rank names the tensor, the first one, whose numbers are right, says that it was another; no step."""
    first, second = results[case]["errors"]
    assert "tensors on another rank of the network are not what" in first
    assert f"{TOWER}encoder.layer.1.mlp.fc1.weight of the network are not what" in second
    assert results[case]["losses"] == []


def test_all_ranks_see_that_a_frozen_tower_has_changed(results):
    """One number, in the second rank's share, behind the first step."""
    errors = results["fsdp/donor/touched"]["errors"]
    assert all("this stage froze the vision tower, but its weights have changed" in error for error in errors)
    assert results["fsdp/donor/touched"]["lineage"] == {}
