"""A run handed on between strategies and numbers of ranks, within a stage: FSDP, one process, DDP, FSDP."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.commands import run_module
from tests.distributed.relay_cases import LEGS, STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relay")
    process = run_module("tests.distributed.relay_cases", folder, timeout=240)
    logs = "".join(path.read_text()[-2000:] for path in folder.glob("*/*.log"))
    assert process.returncode == 0, process.stderr[-3000:] + logs
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_one_process(runs, stage):
    """`frozen` trains the projector alone: there DDP and FSDP number an optimizer's parameters differently."""
    whole, relay = runs["whole"][0][stage]["losses"], {}
    for (_, _, until), found in zip(LEGS, runs["relay"], strict=True):
        assert max(found[stage]["losses"]) == until
        assert not relay.keys() & found[stage]["losses"].keys(), "a step was taken twice"
        relay |= found[stage]["losses"]
    assert sorted(relay) == sorted(whole) == list(range(1, LEGS[-1][2] + 1))
    assert relay == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_and_moments_are_handed_on_to_the_last_bit(runs, stage):
    """What a leg begins with hashes to what the one before ended with, gathered from however many ranks."""
    relay = [found[stage] for found in runs["relay"]]
    assert [found["ranks"] for found in relay] == [ranks for _, ranks, _ in LEGS]
    for before, behind in pairwise(relay):
        assert behind["hashes"][0] == before["hashes"][1]
        assert before["hashes"][0] != before["hashes"][1]
