"""What jobs have come to: which score counts, which job is best, and what the summary says in its three forms."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from ivl_lightning.config.schema import ObjectiveConfig
from ivl_lightning.launch.job import Job
from ivl_lightning.launch.job_progress import LogFollower
from ivl_lightning.launch.objective import Objective, choose_objective
from ivl_lightning.launch.planned_jobs import JobResult, PlannedJob, ended
from ivl_lightning.reporting.job_figure import draw_jobs
from ivl_lightning.reporting.job_summary import write_summary
from ivl_lightning.reporting.job_table import JobRow, JobTable, print_job_table, value_of

LOSS, REWARD, MATCH = {"val/loss": 0.5}, {"val/reward_accuracy": 0.7}, {"val/exact_match": 0.2}


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([{}, LOSS], Objective("val/loss", "minimize")),
        ([LOSS, LOSS | REWARD], Objective("val/reward_accuracy", "maximize")),
        ([LOSS | REWARD | MATCH, LOSS], Objective("val/exact_match", "maximize")),
        ([LOSS | MATCH | {"val/score": 0.1}], Objective("val/score", "maximize")),
        ([{"train/loss": 1.0}], None),
    ],
)
def test_what_is_compared_where_nobody_says_it(runs, expected):
    """One metric for all runs: the first of the four that any of them has."""
    assert choose_objective(ObjectiveConfig(), runs) == expected


def test_what_is_compared_is_what_is_asked_for():
    asked = ObjectiveConfig(metric="val/anls", goal="minimize")
    assert choose_objective(asked, [LOSS]) == Objective("val/anls", "minimize")
    assert choose_objective(ObjectiveConfig(metric="val/loss/cats"), []) == Objective("val/loss/cats", "maximize")


def test_a_score_that_is_no_number_is_none():
    objective = Objective("val/loss", "minimize")
    assert [objective.of({"val/loss": value}) for value in (0.5, math.nan, math.inf)] == [0.5, None, None]
    assert objective.of({}) is None


def table(folder, varied, scores, metric="val/exact_match", goal="maximize"):
    rows = [
        JobRow(
            number=number,
            varied=keys,
            state="failed" if score is None else "finished",
            exit_code=1 if score is None else 0,
            score=score,
            seconds=math.nan if score is None else 65.0,
            folder=folder / str(number),
            error="error: <b>no</b> rows" if score is None else "",
        )
        for number, (keys, score) in enumerate(zip(varied, scores, strict=True))
    ]
    return JobTable(folder, "python train.py -m optim.lr=1e-5,2e-5", metric, goal, rows)


@pytest.fixture
def jobs(tmp_path):
    """Three learning rates, of which the last has failed; only the first has a report."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0/report.html").touch()
    return table(tmp_path, [{"optim.lr": "1e-05"}, {"optim.lr": "2e-05"}, {"optim.lr": "1.0"}], [0.25, 0.75, None])


def test_the_best_job(jobs, tmp_path):
    assert jobs.best.number == 1
    worse_is_better = table(tmp_path, [row.varied for row in jobs.rows], [0.25, 0.75, None], "val/loss", "minimize")
    assert worse_is_better.best.number == 0
    assert table(tmp_path, [{}], [None]).best is None


def test_the_summary_for_programs(jobs, tmp_path):
    write_summary(jobs)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["metric"], summary["goal"], summary["best"]) == ("val/exact_match", "maximize", 1)
    assert summary["jobs"][0] == {
        "number": 0,
        "overrides": {"optim.lr": "1e-05"},
        "state": "finished",
        "exit_code": 0,
        "score": 0.25,
        "seconds": 65.0,
        "run_dir": str(tmp_path / "0"),
        "error": None,
    }
    assert (summary["jobs"][2]["score"], summary["jobs"][2]["seconds"]) == (None, None)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert [row["val/exact_match"] for row in rows] == ["0.25", "0.75", ""]
    assert [row["optim.lr"] for row in rows] == ["1e-05", "2e-05", "1.0"]


def test_the_page_links_reports_that_there_are(jobs):
    page = write_summary(jobs).read_text()
    assert page.count("report.html</a>") == 1
    assert '<a href="0/report.html">' in page
    assert "75.0%</strong>" in page
    assert "data:image/svg+xml" in page
    assert "error: &lt;b&gt;no&lt;/b&gt; rows" in page


def test_a_page_without_any_score(tmp_path):
    page = write_summary(table(tmp_path, [{}, {}], [None, None], metric=None, goal="")).read_text()
    assert "data:image" not in page
    assert "0 of 2</strong>" in page


def test_the_table_on_a_terminal(jobs):
    console = Console(file=io.StringIO(), width=80)
    print_job_table(jobs, console)
    lines = console.file.getvalue().splitlines()
    assert [line.split() for line in lines[-3:]] == [
        ["0", "1e-05", "25.0%", "finished", "1", "min", "5", "s"],
        ["1", "2e-05", "75.0%", "finished", "1", "min", "5", "s"],
        ["2", "1.0", "none", "failed", "(1)", "none"],
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-05", 1e-05), ("3", 3.0), ("true", "true"), ("null", "null"), ("[1,2]", "[1,2]"), ("NaN", "NaN"), ("", "")],
)
def test_values_that_are_numbers(text, value):
    assert value_of(text) == value


def drawn(folder, varied):
    scores = [0.1 + 0.01 * place for place in range(len(varied))]
    (axes,) = draw_jobs(table(folder, varied, scores)).axes
    return axes


def test_one_number_is_drawn_as_a_curve(tmp_path):
    """On a logarithmic axis where it spans a factor of ten; two seeds of one place are averaged."""
    axes = drawn(tmp_path, [{"optim.lr": lr} for lr in ("1e-4", "1e-5", "1e-5")])
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "optim.lr")
    curve = axes.lines[0]
    assert list(curve.get_xdata()) == [1e-5, 1e-4]
    # Of 0.11 and 0.12, and of 0.10 alone.
    assert list(curve.get_ydata()) == pytest.approx([0.115, 0.10])
    assert drawn(tmp_path, [{"optim.lr": lr} for lr in ("1e-5", "2e-5")]).get_xscale() == "linear"
    assert drawn(tmp_path, [{"optim.weight_decay": decay} for decay in ("0", "0.1")]).get_xscale() == "linear"


def test_a_second_setting_makes_a_line_of_each_of_its_values(tmp_path):
    axes = drawn(tmp_path, [{"optim.lr": lr, "loss.reduction": by} for lr in ("1", "2") for by in ("token", "square")])
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert labels == ["loss.reduction=token", "loss.reduction=square", "best"]


def test_more_settings_are_drawn_as_parallel_axes(tmp_path):
    """The best job, the last one, is in front; a setting that never changes has no axis."""
    varied = [
        {"seed": "0", "optim.lr": lr, "loss.reduction": by, "preference.beta": beta}
        for lr in ("1e-5", "1e-4")
        for by in ("token", "square")
        for beta in ("0.1", "0.5")
    ]
    axes = drawn(tmp_path, varied)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["optim.lr", "loss.reduction", "preference.beta", "val/exact_match (%)"]
    assert len(axes.lines) == 8
    assert list(axes.lines[-1].get_ydata()) == [1.0, 0.75, 1.0, 1.0]


def test_texts_are_drawn_as_a_dot_for_each_job(tmp_path):
    axes = drawn(tmp_path, [{"lora": choice} for choice in ("none", "llm", "all")])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0: none", "1: llm", "2: all"]


def test_what_failed_is_the_first_error_of_the_last_try(tmp_path):
    """The others follow from it. What a progress bar has written over is not shown."""
    job = Job(0, (), (), str(tmp_path))
    planned = PlannedJob(job, ({},))
    before = "---- 2026-11-26 06:00:00\nerror: out of memory\n---- 2026-11-26 07:00:00\nstage -> folder\n"
    told = "error on rank 1: no rows\n(the traceback is in x)\n\rstep 1\rstep 2\r\nerror: stage failed\n"
    job.log.write_text(before + told)
    assert ended(planned, 1, 0.0, job.log).what_failed() == told.replace("\rstep 1\rstep 2\r", "step 2").rstrip()
    job.log.write_text("".join(f"line {place}\n" for place in range(9)))
    assert ended(planned, 1, 0.0, job.log).what_failed().splitlines() == [f"line {place}" for place in range(3, 9)]
    assert JobResult(planned, "failed").what_failed() == ""


def test_a_job_that_a_signal_has_killed(tmp_path):
    """137 is what a shell would say of SIGKILL, as of any other run."""
    result = ended(PlannedJob(Job(0, (), (), str(tmp_path)), ({},)), -9, 0.0, tmp_path / "none")
    assert (result.state, result.exit_code) == ("failed", 137)


def test_a_log_is_followed_line_by_line(tmp_path):
    log = tmp_path / "job.log"
    log.write_text("of an earlier try\n")
    follower = LogFollower(log)
    with log.open("a") as file:
        file.write("one\ntw")
        file.flush()
        assert follower.new_lines() == ["one"]
        file.write("o\n")
    assert follower.new_lines() == ["two"]
    assert follower.new_lines() == []
    assert LogFollower(tmp_path / "none").new_lines() == []
