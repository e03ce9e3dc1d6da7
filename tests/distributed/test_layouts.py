"""The same losses, gradients and validation on any layout, on gloo ranks.

One process that accumulates 4 packs, 2 ranks with 2, 4 ranks with 1; DDP, FSDP2, and HSDP over two nodes of 2 ranks
that torchrun starts.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.commands import ROOT
from tests.distributed.fit_cases import CLIP, EMA_DECAY, UNVALIDATED

MODULE = "tests.distributed.layout_cases"
TUNING, WARMUP = "instruction_tuning", "mlp_warmup"
REDUCTIONS = [f"{TUNING}/{reduction}/step" for reduction in ("square", "token", "sample")]
CLIPPED, FROZEN, AVERAGED = f"{TUNING}/square/clip", f"{WARMUP}/square/step", f"{TUNING}/square/ema"
EIGHT, SYNCED, SEVEN = (f"{TUNING}/square/{rule}" for rule in ("packs8", "sync8", "batch7"))
OFFICIAL = f"{WARMUP}/square/micro_batch"
PAIRS = "mpo/{}/online/whole"

ONE = [f"single/{case}" for case in (*REDUCTIONS, CLIPPED, FROZEN, AVERAGED, EIGHT, SEVEN, OFFICIAL)]
ONE += [PAIRS.format("single")]
TWO = [f"ddp/{case}" for case in (REDUCTIONS[0], CLIPPED, AVERAGED, SEVEN)]
TWO += [f"fsdp/{case}" for case in (*REDUCTIONS, CLIPPED, FROZEN, EIGHT, SYNCED)]
TWO += [f"fsdp/{TUNING}/square/{rule}" for rule in ("offload", "prefetch")]
FOUR = [f"{strategy}/{REDUCTIONS[0]}" for strategy in ("ddp", "fsdp")]
NODES = [f"hsdp/{case}" for case in (*REDUCTIONS, CLIPPED, FROZEN, EIGHT, SYNCED)] + [PAIRS.format("hsdp")]

GROWN = [f"ddp/{TUNING}/square/resume1", f"fsdp/{TUNING}/square/emaresume2"]
SHRUNK = [f"single/{TUNING}/square/{rule}" for rule in ("resume2", "resume4", "emaresume2")]

# Switches say how a step is made, and not what it is.
SWITCHES = {"sync8": "packs8", "offload": "step", "prefetch": "step", "compile": "step", "emaresume2": "ema"}
LAYOUTS = [("2", case) for case in TWO] + [("4", case) for case in FOUR] + [("nodes", case) for case in NODES]


def alone(case: str) -> str:
    """The case of one process that this one must equal."""
    if case.startswith("mpo/"):
        return PAIRS.format("single")
    _, stage, reduction, rule = case.split("/")
    return f"single/{stage}/{reduction}/{SWITCHES.get(rule, rule)}"


def start_nodes(folder: Path, cases: list[str]) -> list[subprocess.Popen[bytes]]:
    """Two nodes of two ranks, each as `torchrun --nnodes=2` starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "nodes").mkdir()
    nodes = []
    for number in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
        command += [f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        with (folder / f"nodes/{number}.log").open("wb") as log:
            command += ["-m", MODULE, str(folder), f"4:{','.join(cases)}"]
            nodes.append(subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log))
    return nodes


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def write_data(folder: Path) -> None:
    tiny.write_tiny_data(folder / "data")
    tiny.write_tiny_pairs(folder / "pairs")


def run(folder: Path, groups: list[tuple[int, list[str]]], nodes: list[str], *, timeout: int = 300) -> dict[str, dict]:
    """What each group of ranks has written: by its size, and of the two nodes."""
    started = start_nodes(folder, nodes) if nodes else []
    try:
        command = [sys.executable, "-m", MODULE, str(folder), *(f"{size}:{','.join(cases)}" for size, cases in groups)]
        subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=timeout, check=True)
        for node in started:
            node.wait(timeout=timeout)
    finally:
        for node in started:
            node.kill()
    found: dict[str, dict] = {}
    for number, (size, _) in enumerate(groups):
        found.setdefault(str(size), {}).update(written(folder / str(number), size))
    if nodes:
        found["nodes"] = written(folder / "nodes", 4)
    return found


def written(folder: Path, size: int) -> dict:
    path = folder / f"{size}.pt"
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))
    assert path.is_file(), logs
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each group of ranks starts once and loops over its cases."""
    folder = tmp_path_factory.mktemp("layouts")
    write_data(folder)
    return run(folder, [(1, ONE), (2, [*TWO, *GROWN, f"ddp/{OFFICIAL}"]), (4, FOUR), (1, SHRUNK)], NODES)


def check_same_steps(ours: dict, wanted: dict) -> None:
    """Losses of all steps, and all gradients of the first and of the last one, as the optimizer took them."""
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    for when in [name for name in ("gradients", "last_gradients") if name in wanted]:
        assert ours[when].keys() == wanted[when].keys()
        assert len(wanted[when]) >= 6
        for name, gradient in ours[when].items():
            torch.testing.assert_close(gradient, wanted[when][name], atol=1e-6, rtol=1e-6, msg=f"{when} {name}")


@pytest.mark.parametrize(("group", "case"), LAYOUTS)
def test_layout_changes_nothing(results, group, case):
    """Equal to 1e-6, relative for losses, absolute and relative for gradients, of which the largest is 2.4.

    Packs are uneven and some have no tile. Steps are of 4 packs, the last one of 2, so two of four ranks have none.
    """
    check_same_steps(results[group][case], results["1"][alone(case)])


@pytest.mark.parametrize(("group", "case"), [entry for entry in LAYOUTS if not entry[1].endswith(UNVALIDATED)])
def test_validation_is_the_same(results, group, case):
    """Losses, and scores of generated answers, of 5 rows: ranks have more, fewer, or none of them."""
    ours, wanted = results[group][case]["validation"], results["1"][alone(case)]["validation"]
    assert "val/loss" in wanted
    assert ours == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("group", "case"), [entry for entry in LAYOUTS if entry[1].endswith(f"{TUNING}/square/step")])
def test_answers_at_tile_limits_are_the_same(results, group, case):
    """All ranks answer all rows at both limits, in one order."""
    ours, wanted = results[group][case]["limits"], results["1"][alone(case)]["limits"]
    assert ours.keys() == wanted.keys() == {"1", "4"}
    assert wanted["4"]["tiles"] > wanted["1"]["tiles"] > 0.0
    for limit, scores in wanted.items():
        assert {"anls/pictures", "exact_match/text", "score"} <= scores.keys()
        assert scores["answer_tokens"] > 0.0
        assert ours[limit] == pytest.approx(scores, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("group", "case"), [("1", ONE[0]), ("2", TWO[0]), ("4", FOUR[1]), ("nodes", NODES[0])])
def test_scores_add_up_over_ranks(results, group, case):
    """Ten votes: two for the cat, 0.6, and one for the bird, 0.3, mean 0.45. Of four words three are right.

    Of six answers one is cut off; tokens (0 + ... + 5) / 6. With four ranks two have one answer and none of a dataset.
    """
    assert results[group][case]["shares"] == pytest.approx(
        {
            "vqa_score/votes": 0.45,
            "vqa_score": 0.45,
            "exact_match/words": 0.75,
            "exact_match": 0.75,
            "score": 0.6,
            "repeats": 0.0,
            "cut_off": 1 / 6,
            "answer_tokens": 2.5,
        }
    )


PROBED = [("2", f"ddp/{AVERAGED}"), *((group, case) for group, case in LAYOUTS if case.endswith(REDUCTIONS[0]))]


@pytest.mark.parametrize(("group", "case"), [*PROBED, *(("2", case) for case in GROWN), *(("1", c) for c in SHRUNK)])
def test_the_probe_set_answers_alike(results, group, case):
    """The same rows in the same order at the same steps, of 5 rows on up to 4 ranks; a resumed run begins at step 2.

    Averages answer where there are some, and sharded ones are put in place and back between two steps.
    """
    rule = AVERAGED if "ema" in case else REDUCTIONS[0]
    ours, wanted = results[group][case]["cards"], results["1"][f"single/{rule}"]["cards"]
    steps = (2, 3) if "resume" in case else (0, 1, 2, 3)
    assert len(wanted) == 4 * 5
    assert ours == [card for card in wanted if card[0] in steps]


@pytest.mark.parametrize("group", ["4", "nodes"])
def test_ranks_without_a_label_take_part(results, group):
    """Packs of the last step: 13 and 17 labels, and two that are empty."""
    strategy = "ddp" if group == "4" else "hsdp"
    by_rank = results[group][f"{strategy}/{REDUCTIONS[0]}"]["labels"]
    assert [labels[-1] for labels in by_rank] == [13, 17, 0, 0]
    whole = results["1"][f"single/{REDUCTIONS[0]}"]
    assert [sum(labels) for labels in zip(*by_rank, strict=True)] == whole["labels"][0]
    losses = whole["losses"]
    assert losses[2] < losses[1] < losses[0] - 0.1, "nothing was learned, so later steps would prove nothing"


def test_clipping_bites(results):
    """The last step's gradients are of norm CLIP, and the losses are not those of gradients that were left whole."""
    clipped, whole = (results["1"][f"single/{case}"] for case in (CLIPPED, REDUCTIONS[0]))
    norms = [sum(float(g.square().sum()) for g in run["last_gradients"].values()) ** 0.5 for run in (clipped, whole)]
    assert norms[0] == pytest.approx(CLIP, rel=1e-4)
    assert norms[1] > 20 * CLIP
    assert abs(clipped["losses"][2] - whole["losses"][2]) > 0.1


def test_gradients_travel_once_a_step(results):
    """Two ranks with 4 micro-batches each: a quarter of the calls when gradients wait for the last one.

    Seven units have gradients: two blocks each side, tower, projector and root. Between copies (HSDP, 2 micro-batches)
    gradients travel once a step either way.
    """
    deferred, each = (results["2"][f"fsdp/{case}"]["calls"]["_reduce_scatter_base_"] for case in (EIGHT, SYNCED))
    assert (deferred, each) == (7, 4 * 7)
    deferred, each = (results["nodes"][f"hsdp/{case}"]["calls"] for case in (EIGHT, SYNCED))
    assert (deferred["_reduce_scatter_base_"], each["_reduce_scatter_base_"]) == (7, 2 * 7)
    assert deferred["allreduce_"] == each["allreduce_"]


def test_weights_are_gathered_once_for_all_chunks_of_the_head(results):
    """Each micro-batch: 7 units in forward, and in backward the 6 below the root, whatever is behind the last norm.

    A pack's 4 to 17 labels are 2 to 9 chunks of two.
    """
    for case in (EIGHT, SYNCED):
        assert results["2"][f"fsdp/{case}"]["calls"]["_allgather_base_"] == 4 * (7 + 6)
        assert results["nodes"][f"hsdp/{case}"]["calls"]["_allgather_base_"] == 2 * (7 + 6)


@pytest.mark.parametrize(("group", "case"), [("2", f"fsdp/{FROZEN}"), ("nodes", f"hsdp/{FROZEN}")])
def test_only_the_projector_trains(results, group, case):
    """And its gradients travel in one call for each of the three steps: the frozen units have none."""
    found = results[group][case]
    assert all("multi_modal_projector" in name for name in found["gradients"])
    assert found["calls"]["_reduce_scatter_base_"] == 3


@pytest.mark.parametrize(("group", "case"), [("2", GROWN[0]), *(("1", case) for case in SHRUNK[:2])])
def test_another_number_of_ranks_goes_on(results, group, case):
    """Behind step 1 of one process on 2 ranks, and of 2 and 4 ranks on one process: the same packs and losses.

    One step is 4, 2 or 1 micro-batches, so a count of them that is taken over steps the optimizer at wrong places.
    """
    wanted = results["1"][f"single/{REDUCTIONS[0]}"]["losses"]
    assert results[group][case]["losses"] == pytest.approx(wanted[1:], rel=1e-6)


def test_averages_are_those_of_the_steps(results):
    """Behind 0, 1 and 2 updates d is 1/10, then 2/11 and 3/12, of which both are above 0.15.

    a1 = 0.1 w0 + 0.9 w1, a2 = 0.15 a1 + 0.85 w2, a3 = 0.15 a2 + 0.85 w3: what the network holds behind the fit.
    """
    found = results["1"][f"single/{AVERAGED}"]
    steps = found["trajectory"]
    assert len(steps) == 4
    assert EMA_DECAY == 0.15
    for name, average in found["weights"].items():
        w0, w1, w2, w3 = (step[name].double() for step in steps)
        wanted = 0.15 * (0.15 * (0.1 * w0 + 0.9 * w1) + 0.85 * w2) + 0.85 * w3
        torch.testing.assert_close(average.double(), wanted, atol=1e-6, rtol=0.0, msg=name)
    moved = max(float((found["weights"][name] - last).abs().max()) for name, last in steps[3].items())
    assert moved > 1e-3, "averages and last weights must differ for this to say anything"


@pytest.mark.parametrize(("group", "case"), [("2", f"ddp/{AVERAGED}"), ("2", GROWN[1]), ("1", SHRUNK[2])])
def test_averages_are_the_same_on_any_layout(results, group, case):
    """Of two copies, and behind step 1 of those on two shards and on one process; validation runs with them."""
    ours, wanted = results[group][case], results["1"][f"single/{AVERAGED}"]
    assert ours["weights"].keys() == wanted["weights"].keys()
    for name, value in ours["weights"].items():
        torch.testing.assert_close(value, wanted["weights"][name], atol=1e-6, rtol=0.0, msg=name)
    assert ours["validation"] == pytest.approx(wanted["validation"], rel=1e-5, abs=1e-6)
    plain = results["1"][f"single/{REDUCTIONS[0]}"]["validation"]
    assert abs(wanted["validation"]["val/loss"] - plain["val/loss"]) > 1e-3


def test_the_official_normaliser_depends_on_the_layout(results):
    """S / (mean over ranks of W) per micro-batch, then the mean over 4 or 2 micro-steps: a mean of ratios.

    The difference that `step` removes; it must be seen, or the switch back would do nothing.
    """
    one, two = results["1"][f"single/{OFFICIAL}"], results["2"][f"ddp/{OFFICIAL}"]
    assert one["losses"][0] == pytest.approx(two["losses"][0], rel=1e-6), "nothing was learned yet"
    assert one["losses"][2] != pytest.approx(two["losses"][2], rel=1e-5)


@pytest.mark.soak
def test_ddp_with_the_other_reductions(tmp_path):
    """Of two and of four copies."""
    write_data(tmp_path)
    cases = REDUCTIONS[1:]
    ddp = [f"ddp/{case}" for case in cases]
    found = run(tmp_path, [(1, [f"single/{case}" for case in cases]), (2, ddp), (4, ddp)], [])
    for group in ("2", "4"):
        for case in ddp:
            check_same_steps(found[group][case], found["1"][alone(case)])


@pytest.mark.soak
def test_compiled_blocks_change_nothing(tmp_path):
    """On one process and on two shards."""
    write_data(tmp_path)
    case = f"{TUNING}/square"
    alone = [f"single/{case}/step", f"single/{case}/compile"]
    found = run(tmp_path, [(1, alone), (2, [f"fsdp/{case}/compile"])], [], timeout=1200)
    wanted = found["1"][f"single/{case}/step"]
    for ours in (found["1"][f"single/{case}/compile"], found["2"][f"fsdp/{case}/compile"]):
        check_same_steps(ours, wanted)
