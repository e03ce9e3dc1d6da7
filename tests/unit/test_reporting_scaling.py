"""Sequels of a run in its report: the comparison of progressive scaling, the family tree, and gaps in both."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from ivl_lightning.checkpoints.lineage import Lineage, Origin, PartRecord, write_lineage
from ivl_lightning.constants import METRICS_NAME
from ivl_lightning.reporting.family import family
from ivl_lightning.reporting.family_figure import family_figure
from ivl_lightning.reporting.family_layout import layout, rows_of
from ivl_lightning.reporting.placing import apart
from ivl_lightning.reporting.report import write_report
from ivl_lightning.reporting.run_folder import StageSummary, read_run
from ivl_lightning.reporting.scaling import Curve, Measured, compare, first_reaching, scaling_ratio, score_curve
from ivl_lightning.reporting.scaling_figure import scaling_figure
from ivl_lightning.reporting.scaling_text import (
    scaling_cells,
    scaling_columns,
    scaling_sentences,
    shortened,
    shown_path,
)
from ivl_lightning.reporting.stage_borders import borders
from ivl_lightning.reporting.table import print_stage_table

ALL = ["vision", "projector", "llm"]
SEQUELS = {"large": [], "carried": [], "control": []}


def write_metrics(folder: Path, *rows: dict[str, float]) -> None:
    (folder / METRICS_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_stage(
    folder: Path,
    scores: Sequence[tuple[int, float]],
    *,
    trained: Sequence[str] = ("projector",),
    tokens: int = 100,
    origins: Sequence[Origin] | None = None,
    sequels: dict[str, Any] | None = None,
    donor: str | None = None,
) -> Lineage:
    """A finished stage of 4 steps, two datasets of half the tokens of a step each, and scores after some steps."""
    folder.mkdir(parents=True)
    config = {"recipe": {"name": "small", "sequels": sequels}, "scaling": {"donor": donor}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    last = {"val/exact_match": scores[-1][1]} if scores else {}
    summary = StageSummary(folder.name, list(trained), 4, 5.0, 1.0, last, 60.0, {})
    (folder / "done.json").write_text(json.dumps({name: getattr(summary, name) for name in StageSummary.__slots__}))
    half = tokens / 2
    logged = [{"step": n, "data/tokens/color": n * half, "data/tokens/shape": n * half} for n in range(1, 5)]
    write_metrics(folder, *logged, *({"step": step, "val/exact_match": score} for step, score in scores))
    record = PartRecord(9, None, f"{folder.name:.8}{folder.parent.name}")
    parts = {"vision": record}
    lineage = Lineage(folder.name, str(folder.resolve()), list(trained), 4, 4 * tokens, parts, list(origins or []))
    if origins is not None:
        write_lineage(lineage, folder)
    return lineage


def of(lineage: Lineage, *brings: str, donor: bool = False) -> Origin:
    return Origin(f"{lineage.folder}/weights", list(brings or ALL), donor, lineage)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose tower (400 tokens in stage 1.5) is carried to the larger model of `large`, beside a control.

    Both sequels: 4 steps of 100 tokens in stage 1, 4 steps of 200 tokens in stage 2, so 1,200 tokens in 8 steps.
    """
    run = tmp_path / "first_run"
    begun = write_stage(run / "mlp_warmup", [(4, 0.3)], origins=[], sequels=SEQUELS)
    tower = write_stage(run / "vit_incremental", [(4, 0.8)], trained=["vision", "projector"], origins=[of(begun)])
    large = write_stage(run / "large" / "language_warmup", [(4, 0.1)], trained=["llm"], origins=[])
    both = [of(tower, "vision", donor=True), of(large, "llm")]
    first = write_stage(run / "carried" / "mlp_warmup", [(2, 0.3), (4, 0.5)], origins=both)
    write_stage(
        run / "carried" / "instruction_tuning", [(2, 0.625), (4, 0.75)], trained=ALL, tokens=200, origins=[of(first)]
    )
    other = write_stage(run / "control" / "mlp_warmup", [(2, 0.1), (4, 0.2)], origins=[of(large, "llm")])
    write_stage(
        run / "control" / "instruction_tuning", [(2, 0.4), (4, 0.5)], trained=ALL, tokens=200, origins=[of(other)]
    )
    return run


def page(run: Path) -> str:
    return write_report(str(run)).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text[text.index(f"<h2>{title}</h2>") :].partition("</section>")[0]


def curve(*scores: float) -> Curve:
    return Curve("one", [Measured(100 * place, place, score) for place, score in enumerate(scores, 1)], [], 0, 0)


# -- run folder -------------------------------------------------------------------------------------------------------


def test_sequels_are_runs_in_the_order_of_the_recipe(run_dir: Path) -> None:
    write_stage(run_dir / "another" / "mlp_warmup", [])
    (run_dir / "miniature" / "pictures").mkdir(parents=True)
    run = read_run(run_dir)
    assert [stage.name for stage in run.stages] == ["mlp_warmup", "vit_incremental"]
    assert [sequel.name for sequel in run.sequels] == ["large", "carried", "control", "another"]
    assert [stage.name for stage in run.sequels[1].stages] == ["mlp_warmup", "instruction_tuning"]


def test_jobs_of_a_multirun_are_no_sequels(run_dir: Path) -> None:
    write_stage(run_dir / "0" / "mlp_warmup", [])
    assert "0" not in [sequel.name for sequel in read_run(run_dir).sequels]


# -- curves -----------------------------------------------------------------------------------------------------------


def test_tokens_and_steps_go_on_over_the_stages(run_dir: Path) -> None:
    """Stage 1: 200 and 400 tokens after 2 and 4 steps. Stage 2: 2 x 200 and 4 x 200 more."""
    found = score_curve(read_run(run_dir / "carried"))
    assert found.measured == [
        Measured(200, 2, 0.3),
        Measured(400, 4, 0.5),
        Measured(800, 6, 0.625),
        Measured(1200, 8, 0.75),
    ]
    assert [(one.stage, one.tokens) for one in found.stages] == [("mlp_warmup", 0), ("instruction_tuning", 400)]
    assert (found.tokens, found.steps) == (1200, 8)


def test_stages_that_train_no_tower_and_no_projector_do_not_count(run_dir: Path) -> None:
    write_stage(run_dir / "carried" / "language_warmup", [(4, 0.9)], trained=["llm"], tokens=5000)
    found = score_curve(read_run(run_dir / "carried"))
    assert (found.tokens, found.measured[0].score) == (1200, 0.3)
    assert score_curve(read_run(run_dir / "large")).measured == []


def test_adapters_of_the_tower_count_as_training_it(tmp_path: Path) -> None:
    write_stage(tmp_path / "instruction_tuning", [(4, 0.9)], trained=["vision (LoRA)"])
    assert score_curve(read_run(tmp_path)).measured == [Measured(400, 4, 0.9)]


def test_tokens_that_were_logged_seldom_grow_with_the_steps(tmp_path: Path) -> None:
    """60 tokens were logged after 2 steps: 30 after 1, 90 after 3, 120 after all 4."""
    write_stage(tmp_path / "mlp_warmup", [])
    scores = [{"step": 1, "val/exact_match": 0.1}, {"step": 3, "val/exact_match": 0.3}]
    write_metrics(tmp_path / "mlp_warmup", {"step": 2, "data/tokens/color": 60}, *scores)
    found = score_curve(read_run(tmp_path))
    assert (found.measured, found.tokens) == ([Measured(30, 1, 0.1), Measured(90, 3, 0.3)], 120)


def test_run_without_logged_tokens_has_no_curve(tmp_path: Path) -> None:
    write_stage(tmp_path / "mlp_warmup", [])
    write_metrics(tmp_path / "mlp_warmup", {"step": 4, "val/exact_match": 0.5})
    assert score_curve(read_run(tmp_path)).measured == []


def test_first_reaching_takes_the_first_validation_and_none_between() -> None:
    assert first_reaching(curve(0.2, 0.6, 0.4, 0.9), 0.5) == Measured(200, 2, 0.6)
    assert first_reaching(curve(0.2, 0.6), 0.7) is None
    assert first_reaching(curve(), 0.7) is None


def test_equal_scores_count_as_reached_whatever_their_last_digits() -> None:
    """789 of 800 right, once as float32 gave it when the mean was taken in another order."""
    assert first_reaching(curve(0.2, 0.9862499237060547), 0.9862500429153442) == Measured(200, 2, 0.9862499237060547)


# -- comparison -------------------------------------------------------------------------------------------------------


def test_carried_and_control_are_told_apart_by_their_lineage(run_dir: Path) -> None:
    (run_dir / "control").rename(run_dir / "afresh")
    carried, control = compare(read_run(run_dir))
    assert (carried.curve.name, carried.donor, carried.control) == ("carried", True, False)
    assert (control.curve.name, control.donor, control.control, control.tower) == ("afresh", False, True, None)
    assert carried.tower == str(run_dir / "vit_incremental" / "weights")
    assert (carried.tower_tokens, control.tower_tokens) == (400, None)


def test_settings_name_the_donor_where_there_is_no_lineage(tmp_path: Path) -> None:
    write_stage(tmp_path / "mlp_warmup", [])
    write_stage(tmp_path / "afresh" / "mlp_warmup", [(4, 0.5)])
    write_stage(tmp_path / "carried" / "mlp_warmup", [(4, 0.5)], donor="/runs/small")
    control, carried = compare(read_run(tmp_path))
    assert (control.control, control.tower, carried.control, carried.tower) == (True, None, False, "/runs/small")


def test_share_is_of_tokens_until_the_controls_final_score(run_dir: Path) -> None:
    """The control ends at 0.5, first there after 1,200 tokens; carried is there after 400, in step 4: a third."""
    run = read_run(run_dir)
    carried, control = compare(run)
    assert carried.reached == Measured(400, 4, 0.5)
    assert control.reached == Measured(1200, 8, 0.5)
    assert (carried.share, control.share) == (pytest.approx(1 / 3), 1)
    assert scaling_ratio(run.sequels[1], run.sequels[2]) == pytest.approx(1 / 3)


def test_control_that_was_there_before_its_end_is_taken_at_its_first_time(tmp_path: Path) -> None:
    """The control has its final 0.5 after 200 tokens, the other one after 400: twice as many."""
    write_stage(tmp_path / "control" / "mlp_warmup", [(2, 0.5), (3, 0.4), (4, 0.5)])
    write_stage(tmp_path / "carried" / "mlp_warmup", [(2, 0.4), (4, 0.6)])
    assert scaling_ratio(read_run(tmp_path / "carried"), read_run(tmp_path / "control")) == 2


def test_no_share_without_scores_or_without_reaching_them(run_dir: Path) -> None:
    run = read_run(run_dir)
    large, carried, control = run.sequels
    assert scaling_ratio(control, carried) is None
    assert scaling_ratio(carried, large) is None
    assert scaling_ratio(large, control) is None


# -- words ------------------------------------------------------------------------------------------------------------


def test_table_and_sentence(run_dir: Path) -> None:
    run = read_run(run_dir)
    rows = compare(run)
    assert scaling_columns(rows)[-2:] == ("tokens until 50.0%", "steps until 50.0%")
    assert scaling_cells(rows, run.folder) == [
        ("carried", "vit_incremental", "8", "1,200", "75.0%", "400", "4"),
        ("control", "fresh", "8", "1,200", "50.0%", "1,200", "8"),
    ]
    assert scaling_sentences(rows) == [
        "carried needs 33% of the control's tokens to reach 50.0%. "
        "Its tower had been trained on 400 tokens before; they are not counted."
    ]


def test_a_sequel_that_never_gets_there_is_said_to(tmp_path: Path) -> None:
    write_stage(tmp_path / "carried" / "mlp_warmup", [(2, 0.45), (4, 0.4)], donor="/runs/small")
    write_stage(tmp_path / "control" / "mlp_warmup", [(4, 0.5)])
    run = read_run(tmp_path)
    rows = compare(run)
    assert scaling_sentences(rows) == [
        "carried does not reach the control's 50.0%: its best score is 45.0%, after 200 tokens."
    ]
    assert scaling_cells(rows, run.folder)[0] == ("carried", "/runs/small", "4", "400", "40.0%", "none", "none")


def test_sequels_without_a_control_are_not_compared(tmp_path: Path) -> None:
    write_stage(tmp_path / "mlp_warmup", [])
    write_stage(tmp_path / "carried" / "mlp_warmup", [(2, 0.45), (4, 0.4)], donor="/runs/small")
    text = section(page(tmp_path), "Progressive scaling")
    assert "nothing to compare with" in text
    assert text.count('<td class="none">') == 2
    assert 'class="plot"' in text


def test_paths_are_shown_below_the_run_and_shortened_in_the_middle() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abc…fghijk"
    assert shown_path("/runs/one/mlp_warmup/weights", Path("/runs/one")) == "mlp_warmup"
    assert shown_path("/models/tower", Path("/runs/one")) == "/models/tower"
    assert len(shown_path(f"/{'long/' * 30}weights", Path("/runs/one"))) == 44


# -- page -------------------------------------------------------------------------------------------------------------


def test_page_shows_the_comparison_the_sequels_and_the_family(run_dir: Path) -> None:
    text = page(run_dir)
    assert "carried needs 33% of the control&#39;s tokens" in section(text, "Progressive scaling")
    assert "<strong>33%</strong>" in text
    assert section(text, "Progressive scaling").count('class="plot" src="data:image/svg+xml;base64,') == 1
    assert re.findall(r"<h3>(\w+)</h3>", section(text, "Sequels")) == ["large", "carried", "control"]
    assert "<td>instruction_tuning</td><td>vision, projector, llm</td>" in section(text, "Sequels")
    assert section(text, "Lineage").count('class="plot" src="data:image/svg+xml;base64,') == 1


def test_page_of_a_run_without_sequels_and_lineage_is_as_before(tmp_path: Path) -> None:
    write_stage(tmp_path / "mlp_warmup", [(2, 0.3), (4, 0.5)])
    text = page(tmp_path)
    for title in ("Progressive scaling", "Sequels", "Lineage"):
        assert f"<h2>{title}</h2>" not in text


def test_lineage_of_a_lone_run_is_drawn(tmp_path: Path) -> None:
    write_stage(tmp_path / "mlp_warmup", [], origins=[])
    text = page(tmp_path)
    assert "<h2>Lineage</h2>" in text
    assert "<h2>Sequels</h2>" not in text


def test_sequel_that_only_started(run_dir: Path) -> None:
    begun = run_dir / "carried" / "mixed_preference"
    begun.mkdir()
    (begun / "config.yaml").write_text("stage: {trainable: null}\n")
    text = page(run_dir)
    assert "mixed_preference <em>(not finished)</em>" in section(text, "Sequels")
    assert not re.search(r"\bnan\b|\bNone\b", section(text, "Sequels"))


def test_same_run_gives_the_same_pictures(run_dir: Path) -> None:
    run = read_run(run_dir)
    known = family(run)
    assert known is not None
    assert scaling_figure(compare(run)) == scaling_figure(compare(run))
    assert family_figure(known, {}) == family_figure(known, {})


def test_control_of_one_score_is_a_line_without_a_curve(tmp_path: Path) -> None:
    write_stage(tmp_path / "carried" / "mlp_warmup", [(2, 0.3), (4, 0.4)], donor="/runs/small")
    write_stage(tmp_path / "control" / "mlp_warmup", [(4, 0.9)])
    assert scaling_figure(compare(read_run(tmp_path))) is not None


def test_curve_needs_two_scores(tmp_path: Path) -> None:
    write_stage(tmp_path / "carried" / "mlp_warmup", [(4, 0.4)])
    write_stage(tmp_path / "control" / "mlp_warmup", [(4, 0.5)])
    assert scaling_figure(compare(read_run(tmp_path))) is None
    assert scaling_figure([]) is None


def test_stages_that_begin_together_share_a_line(run_dir: Path) -> None:
    """Stage 2 begins after 400 tokens in both runs, then after 400 and 600."""

    def begun(reach: float) -> list[tuple[str, float, list[str]]]:
        curves = [row.curve for row in compare(read_run(run_dir))]
        return [(one.stage, one.tokens, one.runs) for one in borders(curves, reach)]

    assert begun(reach=10) == [
        ("mlp_warmup", 0, ["carried", "control"]),
        ("instruction_tuning", 400, ["carried", "control"]),
    ]
    late = run_dir / "control" / "mlp_warmup" / METRICS_NAME
    later = {"step": 4, "data/tokens/color": 300, "data/tokens/shape": 300}
    late.write_text(late.read_text() + json.dumps(later) + "\n")
    assert begun(reach=10)[1:] == [("instruction_tuning", 400, ["carried"]), ("instruction_tuning", 600, ["control"])]
    assert begun(reach=300)[1:] == [("instruction_tuning", 500, ["carried", "control"])]


def test_names_with_signs_of_mathematics_are_drawn_as_they_are(tmp_path: Path) -> None:
    for name in ("$carried", "$^{$"):
        write_stage(tmp_path / name / "mlp_warmup", [(2, 0.3), (4, 0.5)], origins=[])
    run = read_run(tmp_path)
    known = family(run)
    assert known is not None
    assert scaling_figure(compare(run))
    assert family_figure(known, {})


# -- family -----------------------------------------------------------------------------------------------------------


def test_family_has_each_stage_once(run_dir: Path) -> None:
    """`large` is an ancestor of both sequels, `vit_incremental` of carried and the run's own last model."""
    known = family(read_run(run_dir))
    assert known is not None
    names = [(member.run, member.name) for member in known.members]
    assert names == [
        ("first_run", "mlp_warmup"),
        ("first_run", "vit_incremental"),
        ("large", "language_warmup"),
        ("carried", "mlp_warmup"),
        ("carried", "instruction_tuning"),
        ("control", "mlp_warmup"),
        ("control", "instruction_tuning"),
    ]
    assert [member.name for member in known.members if member.last] == [
        "vit_incremental",
        "language_warmup",
        "instruction_tuning",
        "instruction_tuning",
    ]
    assert [(one.parent, one.child) for one in known.descents] == [(0, 1), (1, 3), (2, 3), (3, 4), (2, 5), (5, 6)]
    assert [(one.brings, one.donor) for one in known.descents[1:3]] == [(["vision"], True), (["llm"], False)]
    assert [member.place for member in known.members[::3]] == ["first_run", "first_run/carried", "first_run/control"]


def test_checkpoints_without_a_record_are_drawn_once(tmp_path: Path) -> None:
    released = Origin("/models/InternVL2_5-1B", ALL, False, None)
    for name in ("one", "two"):
        write_stage(tmp_path / name / "mlp_warmup", [], origins=[released])
    known = family(read_run(tmp_path))
    assert known is not None
    assert [(member.name, member.place, member.lineage is None) for member in known.members][:2] == [
        ("InternVL2_5-1B", "/models", True),
        ("mlp_warmup", f"{tmp_path.name}/one", False),
    ]
    assert [(one.parent, one.child) for one in known.descents] == [(0, 1), (0, 2)]


def test_stage_that_was_trained_again_is_another_ancestor(run_dir: Path) -> None:
    """The run's stage 1.5 has new numbers, carried still comes from the old ones: 8 networks, not 7."""
    again = run_dir / "vit_incremental"
    old = json.loads((again / "lineage.json").read_text())
    old["stages"][-1]["parts"]["vision"]["after"] = "retrained"
    (again / "lineage.json").write_text(json.dumps(old))
    known = family(read_run(run_dir))
    assert known is not None
    assert len(known.members) == 8


EDGES = [
    [],
    [(0, 1)],
    [(number, number + 1) for number in range(11)],
    # Two chains that meet, one of them long; a sequel of the first; and a way across three rows.
    [(0, 1), (1, 2), (2, 3), (3, 4), (5, 6), (2, 6), (5, 7), (7, 8), (1, 9), (4, 9)],
    [(0, 8), (1, 8), (2, 8), (3, 9), (0, 9), (1, 10), (2, 10), (3, 11)],
]


@pytest.mark.parametrize("edges", EDGES)
def test_boxes_do_not_overlap_and_children_stand_below(edges: list[tuple[int, int]]) -> None:
    count = max((child for _, child in edges), default=0) + 1
    plan = layout(count, edges)
    assert len(set(plan.boxes)) == count
    for (center, row), (other, other_row) in combinations(plan.boxes, 2):
        assert row != other_row or abs(center - other) > 1
    for parent, child in edges:
        assert plan.boxes[parent][1] < plan.boxes[child][1]
    assert all(0.5 - 1e-9 <= center <= plan.width - 0.5 + 1e-9 for center, _ in plan.boxes)


@pytest.mark.parametrize("edges", EDGES)
def test_arrows_pass_between_boxes(edges: list[tuple[int, int]]) -> None:
    count = max((child for _, child in edges), default=0) + 1
    plan = layout(count, edges)
    for (parent, child), route in zip(edges, plan.routes, strict=True):
        assert (route[0], route[-1]) == (plan.boxes[parent], plan.boxes[child])
        assert all(below[1] == above[1] + 1 for above, below in pairwise(route))
        for center, row in route[1:-1]:
            assert all(abs(center - box) > 0.5 for box, box_row in plan.boxes if box_row == row)


def test_chain_stands_straight_and_parents_right_above_their_children() -> None:
    """A chain of 4 into box 3, and box 4, which box 3 comes from too: in row 2, not at the top."""
    plan = layout(4, [(0, 1), (1, 2), (2, 3)])
    assert plan.boxes == [(0.5, 0), (0.5, 1), (0.5, 2), (0.5, 3)]
    assert rows_of(5, [(0, 1), (1, 2), (2, 4), (3, 4)]) == [0, 1, 2, 2, 3]


def test_apart_moves_both_neighbors_by_half() -> None:
    """1 and 2 are to be 3 apart: half of the missing 2 each."""
    assert apart([1.0, 2.0], [3.0]) == [0.0, 3.0]
    assert apart([1.0, 5.0], [3.0]) == [1.0, 5.0]
    assert apart([2.0, 2.0, 2.0], [1.0, 1.0]) == [1.0, 2.0, 3.0]
    assert apart([], []) == []


def test_family_of_twelve_has_the_height_of_twelve_boxes(tmp_path: Path) -> None:
    lineage = write_stage(tmp_path / "0", [], origins=[])
    for number in range(1, 12):
        lineage = write_stage(tmp_path / f"{number:02}" / "stage", [], origins=[of(lineage)])
    known = family(read_run(tmp_path / "11"))
    assert known is not None
    assert len(known.members) == 12
    picture = base64.b64decode(family_figure(known, {}).partition("base64,")[2]).decode()
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', picture)
    assert size is not None
    # 11 rows of 1.28 inches, a box of 0.76 and margins of 0.2, in points.
    assert [float(side) for side in size.groups()] == pytest.approx([792, 72 * (11 * 1.28 + 0.96)])


# -- table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 160])
def test_names_of_sequels_fit_the_table(width: int) -> None:
    output = io.StringIO()
    names = ("carried: instruction_tuning", "carried_with_a_long_name: mlp_warmup", "[bold]: mlp_warmup")
    stages = [StageSummary(name, ALL, 320, 0.68812, 0.125, {}, 130.0, {}) for name in names]
    print_stage_table(stages, Console(file=output, width=width))
    text = output.getvalue()
    for part in ("carried:", "instruction_tuning", "carried_with_a_lon", "g_name:", "[bold]:", "0.688 -> 0.125"):
        assert part in text
    assert text.count("2 min 10 s") == 3
    assert "…" not in text
