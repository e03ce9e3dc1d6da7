"""The report of a hand-made run folder: what it reads, what it shows, and that gaps do not break it."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from ivl_lightning.constants import METRICS_NAME, TILE_CURVE_NAME
from ivl_lightning.data.sample_file import SAMPLES_NAME, SampleCard
from ivl_lightning.environment import ENVIRONMENT_NAME
from ivl_lightning.reporting.logged_metrics import Metrics, read_metrics, smoothed, thinned
from ivl_lightning.reporting.report import write_report
from ivl_lightning.reporting.run_folder import StageSummary, read_run
from ivl_lightning.reporting.table import duration, print_stage_table
from ivl_lightning.reporting.training_figures import distinct_rates


def summary(stage: str, **changes: Any) -> StageSummary:
    values: dict[str, Any] = {
        "stage": stage,
        "trained": ["projector"],
        "steps": 40,
        "loss_first": 5.25,
        "loss_last": 0.125,
        "scores": {
            "val/loss": 0.5,
            "val/score": 0.75,
            "val/exact_match": 0.75,
            "val/exact_match/color": 1.0,
            "val/exact_match/shape": 0.5,
        },
        "seconds": 75.0,
        "rejected": {},
    }
    return StageSummary(**{**values, **changes})


def write_done(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = summary(folder.name, **changes)
    values = {name: getattr(known, name) for name in StageSummary.__slots__}
    others = {"settings": {"seed": 0}, "input_weights": "random", "output_weights": "abc"}
    (folder / "done.json").write_text(json.dumps({**values, **others}))


def write_config(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"stage": {"trainable": None}, "model": {"name": "tiny"}, "recipe": {"name": "small"}, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def sample(**changes: Any) -> dict[str, Any]:
    card = SampleCard(
        step=40,
        dataset="color",
        file="val.jsonl",
        line=1,
        digest="d",
        question="What color?",
        expected="red",
        generated="red",
        truths=["red"],
        metric="exact_match",
        score=1.0,
        tiles=0,
        prompt_tokens=12,
    )
    return {**asdict(card), **changes}


def write_lines(file: Path, *rows: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two finished stages, without the metrics that figures are drawn from."""
    run = tmp_path / "first_run"
    for name in ("mlp_warmup", "instruction_tuning"):
        write_done(run / name)
        write_config(run / name)
        write_lines(run / name / SAMPLES_NAME, sample())
    return run


@pytest.fixture
def logged_run(run_dir: Path) -> Path:
    """The same with metrics."""
    packing = ("fill_tokens", "fill_tiles", "samples", "tokens_per_s", "tiles_per_s", "idle", "tokens/charts")
    columns = ("step", "train/loss", "train/loss/charts", *(f"data/{name}" for name in packing))
    trained = [(1, 5.25, 6.5, 0.9, 0.8, 10, 100, 7, 0.25, 1000), (2, 0.125, 4.75, 0.7, 0.6, 20, 300, 9, 0.35, 2345)]
    validated = {"step": 2, "val/loss": 0.5, "val/score": 0.75, "val/exact_match": 0.75, "val/exact_match/color": 1.0}
    for name in ("mlp_warmup", "instruction_tuning"):
        rows = (dict(zip(columns, row, strict=True)) for row in trained)
        write_lines(run_dir / name / METRICS_NAME, *rows, validated)
    return run_dir


def page(run: Path) -> str:
    return write_report(str(run)).read_text(encoding="utf-8")


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_later_lines_win_and_sparse_lines_of_a_step_join(tmp_path: Path) -> None:
    first = [{"step": 1, "train/loss": 5}, {"step": 2, "train/loss": 4}, {"step": 2, "val/loss": 0.9}]
    again = [{"step": 2, "train/loss": 3, "lr": 0.1}, {"step": None, "own": 1}, {"step": 3, "train/loss": 2, "lr": 0.1}]
    write_lines(tmp_path / METRICS_NAME, *first, *again)
    metrics = read_metrics(tmp_path)
    assert metrics.by_step == {
        1: {"train/loss": 5},
        2: {"train/loss": 3, "val/loss": 0.9, "lr": 0.1},
        3: {"train/loss": 2, "lr": 0.1},
    }
    assert metrics.series("val/loss") == [(2, 0.9)]


def test_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / METRICS_NAME
    write_lines(file, {"step": 1, "train/loss": 5}, {"step": 2, "train/loss": 4})
    file.write_text(file.read_text() + '{"step": 3, "train/lo')
    assert read_metrics(tmp_path).series("train/loss") == [(1, 5), (2, 4)]


def test_infinite_and_missing_values_are_not_plotted() -> None:
    metrics = Metrics({0: {"train/loss": float("nan")}, 1: {"train/loss": 2.0}, 2: {"val/loss": float("inf")}})
    assert metrics.series("train/loss") == [(1, 2.0)]
    assert metrics.last("val/") == {}


def test_thinned_keeps_means_and_the_last_step() -> None:
    series = [(step, float(step)) for step in range(10)]
    assert thinned(series, 100) == series
    assert thinned(series, 5) == [(1, 0.5), (3, 2.5), (5, 4.5), (7, 6.5), (9, 8.5)]
    assert thinned([], 5) == []


def test_smoothed_looks_back_only() -> None:
    assert smoothed([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0, 1.0), (1, 2.0), (2, 4.0)]


# -- run folder -------------------------------------------------------------------------------------------------------


def test_stages_stand_in_the_order_of_the_chain(run_dir: Path) -> None:
    write_done(run_dir / "language_warmup")
    (run_dir / "miniature").mkdir()
    names = [stage.name for stage in read_run(run_dir).stages]
    assert names == ["language_warmup", "mlp_warmup", "instruction_tuning"]


def test_unfinished_stage_is_told_from_its_log(logged_run: Path) -> None:
    (logged_run / "instruction_tuning" / "done.json").unlink()
    stage = read_run(logged_run).stages[1]
    assert not stage.finished
    assert (stage.summary.steps, stage.summary.loss_first, stage.summary.loss_last) == (2, 5.25, 0.125)
    assert stage.summary.scores["val/exact_match/color"] == 1.0


# -- table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 160])
def test_table_is_whole_at_usual_widths(width: int) -> None:
    output = io.StringIO()
    stages = [
        summary("instruction_tuning", trained=["vision", "projector", "llm"], seconds=130.0, loss_first=0.68812),
        summary("mlp_warmup", loss_first=float("nan"), loss_last=float("nan"), scores={}, seconds=float("nan")),
    ]
    print_stage_table(stages, Console(file=output, width=width))
    text = output.getvalue()
    for part in ("instruction_tuning", "projector", "llm", "40", "0.688 -> 0.125", "75.0%", "2 min 10 s"):
        assert part in text
    assert text.count("none") == 5, "rewards of both, and loss, score and time of the second"
    assert not re.search(r"\bnan\b|\bNone\b", text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.04, "3.0 s"), (59.99, "1 min 0 s"), (75, "1 min 15 s"), (3599.7, "1 h 0 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- page -------------------------------------------------------------------------------------------------------------


def test_page_shows_run_stages_scores_packing_and_settings(logged_run: Path) -> None:
    (logged_run / "command.txt").write_text("python train.py run_dir='first run'\n")
    text = page(logged_run)
    shares = ("75.0%", "80.0%", "70.0%", "30.0%")
    for part in ("first_run", "Recipe small, model tiny", "5.25 -&gt; 0.125", "1 min 15 s", *shares):
        assert part in text
    assert text.count('class="plot" src="data:image/svg+xml;base64,') == 4
    assert '<td>charts</td><td>2,345</td><td class="none">&ndash;</td><td>4.75</td>' in text
    assert "<td>shape</td><td>50.0%</td><td>50.0%</td>" in text
    assert text.count("every row was used") == 2
    assert "python train.py run_dir=&#39;first run&#39;" in text
    assert "name: tiny" in text


def test_user_text_is_escaped(run_dir: Path) -> None:
    attack = "<script>alert(1)</script>"
    write_lines(run_dir / "mlp_warmup" / SAMPLES_NAME, sample(question=attack, generated=attack, dataset=f'"{attack}'))
    row = {"dataset": attack, "file": attack, "line": 3, "id": None, "reason": attack, "message": attack}
    write_lines(run_dir / "mlp_warmup" / "ledger.jsonl", {**row, "counted": True})
    write_config(run_dir / "instruction_tuning", model={"name": attack})
    (run_dir / "command.txt").write_text(attack)
    text = page(run_dir)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 9


def test_contents_are_the_sections_of_the_page(logged_run: Path) -> None:
    text = page(logged_run)
    sections = re.findall(r'<section id="(\w+)">', text)
    assert re.findall(r'<a href="#(\w+)">', text) == sections
    assert {"stages", "loss", "scores", "answers", "speed", "datasets", "ledger", "again"} == set(sections)


def test_every_validation_number_is_shown(run_dir: Path) -> None:
    """Two metrics: each has a mean of its own, and every dataset says which is its."""
    scores = {"val/score": 0.7, "val/anls": 0.4, "val/anls/scans": 0.4, "val/exact_match": 1.0}
    others = {"val/exact_match/color": 1.0, "val/repeats": 0.25, "val/cut_off": 0.125, "val/answer_tokens": 3.5}
    write_done(run_dir / "instruction_tuning", scores={**scores, **others})
    text = page(run_dir)
    for row in (
        "<td>scans (anls)</td>{}<td>40.0%</td>",
        "<td>color (exact match)</td><td>100.0%</td><td>100.0%</td>",
        "<td>mean anls</td>{}<td>40.0%</td>",
        "<td>mean</td><td>75.0%</td><td>70.0%</td>",
        "<td>answers that repeat themselves</td>{}<td>25.0%</td>",
        "<td>answers cut off at the limit</td>{}<td>12.5%</td>",
        "<td>tokens of an answer</td>{}<td>3.5</td>",
    ):
        assert row.format('<td class="none">&ndash;</td>') in text
    assert "by exact match, anls" in text


def test_curves_of_what_was_logged_are_drawn(run_dir: Path) -> None:
    folder = run_dir / "mlp_warmup"
    rates = [{"step": step, "lr/llm": 0.1, "lr/llm_no_decay": 0.1, "train/grad_norm/llm": 1.5} for step in (1, 2)]
    write_lines(folder / METRICS_NAME, *rates, {"step": 2, "speed/mfu": 0.4, "data/idle": 0.1})
    (folder / TILE_CURVE_NAME).write_text(
        json.dumps([{"max_tiles": n, "score": n / 10, "prompt_tokens": 300.0 * n} for n in (1, 6)])
    )
    metrics = read_run(run_dir).stages[0].metrics
    assert distinct_rates(metrics) == [("llm", [(1, 0.1), (2, 0.1)])], "equal rates of one part are one line"
    text = page(run_dir)
    assert '<section id="optimizer">' in text
    assert "<h3>Over the tile limit</h3>" in text
    assert "<td>40.0%</td>" in text, "the median MFU stands in the table"


def test_run_is_told_how_to_be_made_again(run_dir: Path) -> None:
    """The stage went on with other code on another machine: both are named, the last one's code counts."""
    (run_dir / "command.txt").write_text("python train.py run_dir=mine\n")
    first = {"started": "yesterday", "folder": "/home/me/a b", "ivl-lightning": "0.1.0", "devices": "8 x H100"}
    second = {**first, "started": "today", "devices": "1 x CPU", "git commit": "abc with local changes"}
    (run_dir / "mlp_warmup" / ENVIRONMENT_NAME).write_text(json.dumps([first]))
    (run_dir / "instruction_tuning" / ENVIRONMENT_NAME).write_text(json.dumps([first, second]))
    text = page(run_dir)
    assert "cd &#39;/home/me/a b&#39;\npython train.py run_dir=mine" in text
    assert "ivl-lightning 0.1.0, commit abc<" in text
    assert "local changes" in text
    assert text.count("<dd>8 x H100</dd>") == 1
    assert "mlp_warmup, instruction_tuning" in text
    assert "yesterday" not in text


def test_ledger_counts_by_reason_and_shows_the_first_lines(run_dir: Path) -> None:
    row = {"dataset": "color", "file": "a.jsonl", "id": None, "message": "fetch it again", "counted": True}
    rows = [{**row, "line": line, "reason": "file_missing" if line else "no_answer"} for line in range(12)]
    write_lines(run_dir / "mlp_warmup" / "ledger.jsonl", *rows)
    text = page(run_dir)
    assert "11 file_missing, 1 no_answer" in text
    assert "the first 10 of 12" in text
    assert "a.jsonl:9<" in text
    assert "a.jsonl:10<" not in text


def test_counts_of_done_json_stand_in_for_a_lost_ledger(run_dir: Path) -> None:
    write_done(run_dir / "mlp_warmup", rejected={"no_answer": 2})
    assert "2 no_answer" in page(run_dir)


# -- gaps -------------------------------------------------------------------------------------------------------------


def test_empty_run_has_no_empty_sections(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "0 of 0" in text
    assert re.findall(r'<section id="(\w+)">', text) == ["stages", "again"]
    assert re.findall(r'<a href="#(\w+)">', text) == ["stages", "again"]


def test_stage_that_only_started(run_dir: Path) -> None:
    write_config(run_dir / "mixed_preference", stage={"trainable": ["llm"]})
    text = page(run_dir)
    assert "mixed_preference <em>(not finished)</em>" in text
    assert "none so far; the stage is not finished" in text
    assert "2 of 3" in text


def test_stage_without_log_samples_or_settings(tmp_path: Path) -> None:
    write_done(tmp_path / "mlp_warmup", loss_first=float("nan"), scores={})
    text = page(tmp_path)
    assert "none -&gt; 0.125" in text
    assert not re.search(r"\bnan\b|\bNone\b", text)


def test_scores_without_a_log_still_make_a_table(tmp_path: Path) -> None:
    write_done(tmp_path / "mlp_warmup")
    text = page(tmp_path)
    assert "<td>color</td><td>100.0%</td>" in text
    assert "data:image/svg+xml" not in text
