"""Adapters train alike on any layout: 1 rank x 4 packs and 2 x 2, DDP and FSDP2, on gloo ranks."""

import importlib.util

import pytest
import torch

from tests import tiny
from tests.distributed.running import run_cases

SHARED = ("tuning/kept", "tuning/resume")
PAIRS = ("online", "adapter_off")
QLORA = ("qlora/whole",) if importlib.util.find_spec("bitsandbytes") else ()
ALONE = (*SHARED, *QLORA, "cached/whole", *(f"{kind}/{what}" for kind in PAIRS for what in ("kept", "validate")))
RANKS = (*SHARED, *(f"{kind}/whole" for kind in PAIRS))
CASES = {
    1: [f"single/{case}" for case in ALONE],
    2: [f"{strategy}/{case}" for strategy in ("ddp", "fsdp") for case in RANKS] + [f"ddp/{case}" for case in QLORA],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process and two ranks side by side; what each case gave, by its name."""
    folder = tmp_path_factory.mktemp("lora")
    tiny.write_tiny_pairs(folder / "data")
    found = run_cases("lora_cases", folder, CASES, timeout=240)
    return {case.replace("/kept", "/whole"): found[case] for case in found}


LAYOUTS = [f"{strategy}/{kind}" for strategy in ("ddp", "fsdp") for kind in ("tuning", "adapter_off")]
LAYOUTS += [f"ddp/{case.split('/')[0]}" for case in QLORA]


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_changes_nothing(results, case):
    """Losses of three steps, all gradients of the first, and the merged weights; dropout and drop path at work.

    Ranks begin with the same adapters, and a pack's random numbers follow from its rows, whoever trains it. Adam turns
    a gradient's sign into a step of the learning rate, so weights are compared to a tenth of what they move.
    """
    ours, wanted = results[f"{case}/whole"], results[f"single/{case.split('/')[1]}/whole"]
    assert len(wanted["losses"]) == 3
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
    assert ours["losses"][0] == pytest.approx(wanted["losses"][0], rel=1e-6)
    assert ours["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        torch.testing.assert_close(gradient, wanted["gradients"][name], atol=1e-6, rtol=1e-4, msg=name)
    assert ours["merged"].keys() == wanted["merged"].keys()
    for name, value in ours["merged"].items():
        torch.testing.assert_close(value, wanted["merged"][name], atol=1e-3, rtol=1e-3, msg=name)
    assert ours["validation"] == pytest.approx(wanted["validation"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_a_checkpoint_without_frozen_weights_goes_on(results, strategy):
    """Behind step 1 in a new stage: the losses of the run that went on; adapters and projector alone were kept."""
    ours, whole = results[f"{strategy}/tuning/resume"], results[f"{strategy}/tuning/whole"]
    assert ours["losses"] == whole["losses"][1:]
    network = [name for name in whole["kept"] if name.startswith("root.internvl.")]
    assert len(network) == 2 * 2 * (6 + 7) + 6
    assert all(".lora_" in name or "multi_modal_projector" in name for name in network)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_the_network_without_its_adapters_is_the_reference(results, strategy):
    """The copy in memory has adapters with B = 0, which is the base; the policy without its adapters is that base too:
    losses, gradients and validation to 1e-6.
    """
    ours, wanted = results[f"{strategy}/adapter_off/whole"], results[f"{strategy}/online/whole"]
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    assert len(set(ours["losses"])) == 3
    assert ours["gradients"].keys() == wanted["gradients"].keys()
    assert len(ours["gradients"]) == 2 * 2 * (6 + 7), "adapters alone"
    for name, gradient in ours["gradients"].items():
        torch.testing.assert_close(gradient, wanted["gradients"][name], atol=1e-6, rtol=1e-6, msg=name)
    assert ours["validation"] == pytest.approx(wanted["validation"], rel=1e-6, abs=1e-6)


def test_a_cached_reference_is_the_base(results):
    """Scored before training with adapters at B = 0, in packs of its own."""
    ours, wanted = results["single/cached/whole"], results["single/online/whole"]
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-5)


@pytest.mark.parametrize("reference", ["online", "adapter_off"])
def test_validation_alone_needs_no_cache(results, reference):
    """From the last checkpoint in a new stage: what validation behind the fit gave; rewards are not 0."""
    ours, wanted = results[f"single/{reference}/validate"], results[f"single/{reference}/whole"]["validation"]
    # A trainer that only validates has made no step.
    assert (ours.pop("step"), wanted.pop("step")) == (0, 3)
    assert ours == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert abs(ours["val/reward_margin"]) > 1e-3
