"""The report of a hand-made run folder: what it reads, what it shows, and that gaps do not break it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from ivl_lightning.reporting.environment import git_commit
from ivl_lightning.reporting.metrics_csv import Metrics, read_metrics, smoothed, thinned
from ivl_lightning.reporting.pictures import card_picture, picture_reader
from ivl_lightning.reporting.report import write_report
from ivl_lightning.reporting.run_folder import StageSummary, read_run
from ivl_lightning.reporting.table import duration, print_stage_table


def summary(stage: str, **changes: Any) -> StageSummary:
    values: dict[str, Any] = {
        "stage": stage,
        "trained": ["projector"],
        "steps": 40,
        "loss_first": 5.25,
        "loss_last": 0.125,
        "scores": {
            "val/loss": 0.5,
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


def write_csv(folder: Path, version: int, *lines: str) -> None:
    target = folder / "csv" / f"version_{version}"
    target.mkdir(parents=True)
    (target / "metrics.csv").write_text("".join(f"{line}\n" for line in lines))


def sample(**changes: Any) -> dict[str, Any]:
    values = {"step": 40, "dataset": "color", "file": "val.jsonl", "line": 1, "images": []}
    return {**values, "question": "What color?", "expected": "red", "generated": "red", **changes}


def write_lines(file: Path, *rows: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two finished stages with everything a stage leaves."""
    run = tmp_path / "first_run"
    for name in ("mlp_warmup", "instruction_tuning"):
        folder = run / name
        write_done(folder)
        write_config(folder)
        write_csv(
            folder,
            0,
            "step,train/loss,data/fill_tokens,data/fill_tiles,data/samples,data/tokens_per_s,data/tiles_per_s,"
            "val/loss,val/exact_match,val/exact_match/color,data/idle,train/loss/charts,data/tokens/charts",
            "0,5.25,0.9,0.8,10,100,7,,,,0.25,6.5,1000",
            "1,0.125,0.7,0.6,20,300,9,,,,0.35,4.75,2345",
            "1,,,,,,,0.5,0.75,1.0,,,",
        )
        write_lines(folder / "samples.jsonl", sample())
    return run


def page(run: Path) -> str:
    return write_report(str(run)).read_text(encoding="utf-8")


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_later_version_wins_and_sparse_rows_of_a_step_join(tmp_path: Path) -> None:
    write_csv(tmp_path, 2, "step,train/loss,val/loss", "0,5,", "1,4,", "1,,0.9")
    write_csv(tmp_path, 10, "step,train/loss,lr", "1,3,0.1", "2,2,0.1")
    metrics = read_metrics(tmp_path / "csv")
    assert metrics.by_step == {
        0: {"train/loss": 5},
        1: {"train/loss": 3, "val/loss": 0.9, "lr": 0.1},
        2: {"train/loss": 2, "lr": 0.1},
    }
    assert metrics.series("val/loss") == [(1, 0.9)]


def test_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    write_csv(tmp_path, 0, "step,train/loss", "0,5", "1,4")
    file = tmp_path / "csv" / "version_0" / "metrics.csv"
    file.write_text(file.read_text() + "2,3.4e")
    assert read_metrics(tmp_path / "csv").series("train/loss") == [(0, 5), (1, 4)]


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


def test_last_validation_shows_each_row_once(run_dir: Path) -> None:
    write_lines(
        run_dir / "mlp_warmup" / "samples.jsonl",
        sample(step=20, generated="old"),
        sample(generated="mid-training"),
        sample(line=2),
        sample(generated="at the end"),
    )
    samples = read_run(run_dir).stages[0].last_samples()
    assert [(card["line"], card["generated"]) for card in samples] == [(1, "at the end"), (2, "red")]


def test_unfinished_stage_is_told_from_its_log(run_dir: Path) -> None:
    (run_dir / "instruction_tuning" / "done.json").unlink()
    stage = read_run(run_dir).stages[1]
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
    assert "none -> none" in text
    assert not re.search(r"\bnan\b|\bNone\b", text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.04, "3.0 s"), (59.99, "1 min 0 s"), (75, "1 min 15 s"), (3599.7, "1 h 0 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- page -------------------------------------------------------------------------------------------------------------


def test_page_shows_run_stages_scores_packing_and_settings(run_dir: Path) -> None:
    (run_dir / "command.txt").write_text("python train.py run_dir='first run'\n")
    text = page(run_dir)
    shares = ("75.0%", "80.0%", "70.0%", "30.0%")
    for part in ("first_run", "Recipe small, model tiny", "5.25 -&gt; 0.125", "1 min 15 s", *shares):
        assert part in text
    assert text.count('class="plot" src="data:image/svg+xml;base64,') == 3
    assert "<td>charts</td><td>2,345</td><td>none</td><td>4.75</td>" in text
    assert "<td>shape</td><td>50.0%</td><td>50.0%</td>" in text
    assert text.count("every row was used") == 2
    assert "python train.py run_dir=&#39;first run&#39;" in text
    assert text.count("<details><summary>") == 2
    assert "name: tiny" in text


def test_page_needs_no_other_file(run_dir: Path) -> None:
    picture = run_dir / "red.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    write_lines(run_dir / "mlp_warmup" / "samples.jsonl", sample(images=[str(picture)]))
    text = page(run_dir)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 4
    assert all(source.startswith("data:image/") for source in sources)
    assert "url(" not in text


def test_user_text_is_escaped(run_dir: Path) -> None:
    attack = "<script>alert(1)</script>"
    write_lines(
        run_dir / "mlp_warmup" / "samples.jsonl", sample(question=attack, generated=attack, dataset=f'"{attack}')
    )
    row = {"dataset": attack, "file": attack, "line": 3, "id": None, "reason": attack, "message": attack}
    write_lines(run_dir / "mlp_warmup" / "ledger.jsonl", {**row, "counted": True})
    write_config(run_dir / "instruction_tuning", model={"name": attack})
    (run_dir / "command.txt").write_text(attack)
    text = page(run_dir)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 9


def test_right_and_wrong_are_marked_by_class_and_by_text(run_dir: Path) -> None:
    write_lines(
        run_dir / "instruction_tuning" / "samples.jsonl",
        sample(generated=" red\n"),
        sample(line=2, generated="Red"),
        sample(line=3, generated=""),
    )
    text = page(run_dir)
    deck = text[text.index("instruction_tuning, step 40") : text.index("mlp_warmup, step 40")]
    assert "1 of 3 kept answers right" in deck
    assert (deck.count('class="card right"'), deck.count("&#10003; right")) == (1, 1)
    assert (deck.count('class="card wrong"'), deck.count("&#10007; wrong")) == (2, 2)
    assert "(nothing)" in deck


def test_earlier_stages_show_a_few_cards_of_many_kinds(run_dir: Path) -> None:
    many = [sample(line=line, dataset="color") for line in range(20)] + [sample(line=20, dataset="last kind")]
    for name in ("mlp_warmup", "instruction_tuning"):
        write_lines(run_dir / name / "samples.jsonl", *many)
    text = page(run_dir)
    first, last = text.index("mlp_warmup, step 40"), text.index("instruction_tuning, step 40")
    assert text[last:first].count("<article") == 21
    assert text[first:].count("<article") == 8
    assert "last kind, line 20" in text[first:]


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


def test_empty_run(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "0 of 0" in text
    assert text.count("<p>none</p>") == 8


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


def test_unreadable_pictures_are_said_to_be_so(run_dir: Path) -> None:
    images = [str(run_dir / "gone.png"), "s3://bucket/far.png"]
    write_lines(run_dir / "mlp_warmup" / "samples.jsonl", sample(images=images))
    text = page(run_dir)
    assert text.count("no picture:") == 2
    assert "no such file" in text
    assert "allowed_schemes" in text


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kind", "width", "enlarged"),
    [((64, 64), "png", 128, True), ((256, 64), "png", 512, True), ((300, 200), "png", 300, False)],
)
def test_small_pictures_are_enlarged_on_the_page(
    tmp_path: Path, size: tuple[int, int], kind: str, width: int, enlarged: bool
) -> None:
    file = tmp_path / "picture.png"
    Image.new("RGB", size).save(file)
    picture = card_picture(str(file), picture_reader({}))
    assert picture.source is not None
    assert picture.source.startswith(f"data:image/{kind};base64,")
    assert (picture.width, picture.enlarged) == (width, enlarged)


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.effect_noise((1600, 800), 50).save(file)
    picture = card_picture(str(file), picture_reader({}))
    assert picture.source is not None
    assert picture.source.startswith("data:image/jpeg;base64,")
    assert len(picture.source) < 60_000
    assert (picture.width, picture.enlarged) == (360, False)


# -- environment ------------------------------------------------------------------------------------------------------


def test_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
