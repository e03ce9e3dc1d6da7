"""`python train.py`, shortened: every stage of the miniature, the table, the report, skipping, failing."""

import json
from itertools import pairwise

import pytest

from ivl_lightning.checkpoints.lineage import ancestors, read_lineage, tower_tokens
from ivl_lightning.constants import STAGES
from ivl_lightning.data.sample_file import SAMPLES_NAME, read_cards
from ivl_lightning.environment import ENVIRONMENT_NAME
from tests.commands import ROOT, logged, train

SEQUELS = ("carried/mlp_warmup", "control/mlp_warmup")
SMOKE = ("experiment=miniature_smoke", "trainer.threads=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One shortened run of all stages."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    return folder, train(*SMOKE, f"run_dir={folder}")


def test_every_stage_finishes(run):
    folder, result = run
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(stage in result.stdout for stage in STAGES)
    done = [json.loads((folder / stage / "done.json").read_text()) for stage in STAGES]
    assert [entry["steps"] for entry in done] == [10] * 4 + [3]
    assert [entry["trained"] for entry in done] == [
        ["llm"],
        ["projector"],
        ["vision", "projector"],
        ["vision", "projector", "llm"],
        ["vision", "projector", "llm"],
    ]
    assert done[0]["loss_last"] < done[0]["loss_first"]
    assert all(0.0 <= entry["scores"]["val/exact_match"] <= 1.0 for entry in done)
    assert 0.0 <= done[-1]["scores"]["val/reward_accuracy"] <= 1.0


def test_the_preference_stage_learns_from_the_model_s_own_answers(run):
    """At least the 40 pairs asked for, each chosen answer right; where they come from is counted and reported."""
    folder, _ = run
    counts = json.loads((folder / "miniature/pairs_made/counts.json").read_text())["pairs"]
    files = sorted((folder / "miniature/pairs_made/pairs").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(rows) == sum(sum(kind.values()) for kind in counts.values()) >= 40
    assert all(row["chosen"] == row["answer_gt"] != row["rejected"] for row in rows)
    perturbed = sum(kind["perturbed"] for kind in counts.values())
    assert sum(row["method"] == "perturbed" for row in rows) == perturbed
    report = (folder / "report.html").read_text()
    assert f"<td>training</td><td>{len(rows) - perturbed}</td><td>{perturbed}</td>" in report


def test_each_stage_starts_from_the_one_before(run):
    folder, _ = run
    done = [json.loads((folder / stage / "done.json").read_text()) for stage in STAGES]
    assert done[0]["input_weights"] == "random"
    for before, after in pairwise(done):
        assert after["input_weights"] == before["output_weights"] != after["output_weights"]


def test_the_run_folder_holds_everything(run):
    folder, _ = run
    report = (folder / "report.html").read_text()
    assert "data:image/png;base64" in report
    assert "python" in (folder / "command.txt").read_text()
    for stage in STAGES:
        assert (folder / stage / "config.yaml").is_file()
        assert (folder / stage / "weights/model.safetensors").is_file()
        assert (folder / stage / "weights/tokenizer.json").is_file()
        assert logged(folder / stage, "train/loss")
        steps = json.loads((folder / stage / "done.json").read_text())["steps"]
        assert {card.step for card in read_cards(folder / stage / SAMPLES_NAME)} == {0, steps}
        (start,) = json.loads((folder / stage / ENVIRONMENT_NAME).read_text())
        assert (start["devices"], start["folder"]) == ("1 x CPU", str(ROOT))


def test_the_tower_is_carried_to_another_run(run):
    """`carried` has the tower of stage 1.5, `control` the one it began with; stage 1 froze both."""
    folder, result = run
    lineages = {stage: read_lineage(folder / stage) for stage in ("language_warmup", "vit_incremental", *SEQUELS)}
    tower = {stage: lineage.parts["vision"] for stage, lineage in lineages.items()}
    carried, control = tower["carried/mlp_warmup"], tower["control/mlp_warmup"]
    assert carried.before == carried.after == tower["vit_incremental"].after
    assert control.before == control.after == tower["language_warmup"].after != carried.before
    given = [origin for origin in lineages["carried/mlp_warmup"].origins if origin.donor]
    # Both language models are equally wide, so the projector comes along.
    wanted = f"{folder}/vit_incremental/weights", ["vision", "projector"]
    assert [(origin.path, origin.brings) for origin in given] == [wanted]
    assert given[0].lineage == lineages["vit_incremental"]
    assert not any(origin.donor for origin in lineages["control/mlp_warmup"].origins)
    # Stage 1.5 alone has trained the tower.
    last = lineages["carried/mlp_warmup"]
    assert tower_tokens(last) == lineages["vit_incremental"].tokens
    assert {one.stage for one in ancestors(last)} == {"language_warmup", "mlp_warmup", "vit_incremental"}
    report = (folder / "report.html").read_text()
    assert "Progressive scaling" in report
    assert "Lineage" in report
    assert "carried:" in result.stdout


def test_a_finished_stage_whose_setting_is_changed_is_named(run):
    folder, _ = run
    changed = train(*SMOKE, f"run_dir={folder}", "recipe.stages.mlp_warmup.optim.lr=0.5")
    assert changed.returncode == 1
    assert "mlp_warmup was finished with optim.lr=0.002, this command says 0.5" in changed.stderr.replace("\n", " ")


def test_a_failing_stage_stops_the_chain_with_its_own_error(run, tmp_path):
    """Stage 1.5 gets a meta.json that is not there; the two stages before it are skipped, stage 2 is not started."""
    folder, _ = run
    (folder / "vit_incremental/done.json").rename(tmp_path / "done.json")
    try:
        result = train(*SMOKE, f"run_dir={folder}", "stage_data.vit_incremental=/not/there/meta.json")
    finally:
        (tmp_path / "done.json").rename(folder / "vit_incremental/done.json")
    assert result.returncode == 1
    assert "/not/there/meta.json" in result.stderr
    assert result.stdout.count("is finished, skipped") == 2
    assert "stage vit_incremental failed with exit code 1; later stages were not started" in result.stderr
    assert "Traceback" not in result.stderr
    assert f"report: {folder}/report.html" in result.stdout
    assert "Traceback" in (folder / "vit_incremental/error.log").read_text()
