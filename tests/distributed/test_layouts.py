"""The same loss, gradients and validation on any layout: 1 rank x 4, 2 x 2, 4 x 1, DDP and FSDP2, on gloo ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny

ROOT = Path(__file__).parents[2]
ALL = [f"{strategy}/instruction_tuning/{rule}/step" for strategy in ("ddp", "fsdp") for rule in ("square",)]
TWO_RANKS = [
    *ALL,
    "ddp/instruction_tuning/token/step",
    "ddp/instruction_tuning/sample/step",
    "fsdp/mlp_warmup/square/step",
    "ddp/mlp_warmup/square/micro_batch",
    "ddp/instruction_tuning/square/batch7",
]
FOUR_RANKS = ["ddp/instruction_tuning/square/step"]
GROWN = "ddp/instruction_tuning/square/resume1"
SHRUNK = [f"single/instruction_tuning/square/resume{ranks}" for ranks in (2, 4)]


def start(world_size: int, meta: Path, out: Path, cases: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if world_size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command = [*launcher, "-m", "tests.distributed.fit_cases", str(meta), str(out), str(world_size), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each group of ranks starts once and loops over its cases."""
    folder = tmp_path_factory.mktemp("layouts")
    meta = tiny.write_tiny_data(folder / "data")
    alone = sorted({"/".join(["single", *case.split("/")[1:]]) for case in [*TWO_RANKS, *FOUR_RANKS]})
    found = {}
    runs = ((1, alone), (2, [*TWO_RANKS, GROWN]), (4, FOUR_RANKS), (1, SHRUNK))
    for world_size, cases in runs:
        out = folder / f"{world_size}.pt"
        process = start(world_size, meta, out, cases)
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output[-4000:]
        found.setdefault(world_size, {}).update(torch.load(out, weights_only=True))
    return found


@pytest.mark.parametrize(
    ("world_size", "case"),
    [(2, case) for case in TWO_RANKS if "micro_batch" not in case] + [(4, c) for c in FOUR_RANKS],
)
def test_layout_changes_nothing(results, world_size, case):
    """Losses of three steps and all gradients of the first equal those of one process that accumulates 4 packs.

    The packs are uneven, some have no tile, and the last step of the epoch is short; so it is where steps are of 7 of
    the 19 rows.
    """
    ours = results[world_size][case]
    wanted = results[1]["/".join(["single", *case.split("/")[1:]])]
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert ours["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        torch.testing.assert_close(gradient, wanted["gradients"][name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("world_size", "case"), [(2, GROWN), *((1, case) for case in SHRUNK)])
def test_another_number_of_ranks_goes_on(results, world_size, case):
    """Behind step 1 of one process on 2 ranks, and of 2 and 4 ranks on one process: the same packs and losses.

    One step is 4, 2 or 1 micro-batches, so a count of them that is taken over steps the optimizer at wrong places.
    """
    wanted = results[1]["single/instruction_tuning/square/step"]["losses"]
    assert results[world_size][case]["losses"] == pytest.approx(wanted[1:], rel=1e-5)


@pytest.mark.parametrize("case", [case for case in TWO_RANKS if "micro_batch" not in case])
def test_validation_is_the_same_on_two_ranks(results, case):
    """After the same three steps; the official normaliser takes other steps on another layout."""
    ours = results[2][case]["validation"]
    wanted = results[1]["/".join(["single", *case.split("/")[1:]])]["validation"]
    assert ours.keys() == wanted.keys()
    assert ours == pytest.approx(wanted, rel=1e-4)


def test_only_the_projector_trains_under_fsdp(results):
    names = results[2]["fsdp/mlp_warmup/square/step"]["gradients"]
    assert names
    assert all("multi_modal_projector" in name for name in names)


def test_the_official_normaliser_depends_on_the_layout(results):
    """S / (mean over ranks of W) per micro-batch, then the mean over 4 or 2 micro-steps: a mean of ratios.

    The difference that `step` removes; it must be seen, or the switch back would do nothing.
    """
    one, two = (results[size][f"{name}/mlp_warmup/square/micro_batch"] for size, name in ((1, "single"), (2, "ddp")))
    assert one["losses"][0] == pytest.approx(two["losses"][0], rel=1e-5), "nothing was learned yet"
    assert one["losses"][2] != pytest.approx(two["losses"][2], rel=1e-5)
