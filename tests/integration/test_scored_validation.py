"""Validation rows scored by their datasets' metrics, and at several tile limits, by a plain trainer on a tiny model."""

import json
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from ivl_lightning.callbacks.run_progress import RunProgress
from ivl_lightning.config.schema import EvalConfig
from ivl_lightning.constants import TILE_CURVE_NAME
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.launch.tile_curve import trace_tile_curve
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from tests import tiny


class Kept(Callback):
    """Keeps the answers of a validation."""

    def __init__(self):
        self.answers = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        self.answers += (outputs or {}).get("answers", [])


def build(meta: Path, tokenizer, folder: Path, *, tile_limits=(), metrics=None, callbacks=(), **changes):
    """Stage, data and trainer; all rows of `meta` are trained on, validated and answered."""
    config = tiny.tiny_data_config(meta, val_meta=str(meta), packs_per_step=1, generation_rows=None, **changes)
    data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE, tile_limits=tile_limits)
    stage = InstructionTuning(
        lambda: tiny.build_tiny_model(tokenizer), generation_tokens=4, evaluation=EvalConfig(metrics=metrics)
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=any(isinstance(callback, RunProgress) for callback in callbacks),
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    return stage, data, trainer


def validated(meta: Path, tokenizer, folder: Path, **options) -> tuple[dict[str, float], Kept]:
    kept = Kept()
    stage, data, trainer = build(meta, tokenizer, folder, callbacks=[kept], **options)
    return trainer.validate(stage, data, verbose=False)[0], kept


def write_answers(meta: Path, dataset: str, answers: dict[str, list[str]]) -> None:
    """Give rows of a dataset a list of right answers, by their id."""
    file = meta.parent / f"{dataset}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.dumps({**row, "answers": answers[row["id"]]} if row["id"] in answers else row) for row in rows]
    file.write_text("\n".join(lines) + "\n")


def test_each_dataset_by_its_own_metric(meta, tokenizer, tmp_path):
    """What the model says is written down as right: of 12 pictures for three, of 12 texts by two people of ten.

    Exact match of pictures: 3 / 12; VQA score of texts: 0.6 each; over both 0.425. A metric in the settings counts
    before that of meta.json.
    """
    before, kept = validated(meta, tokenizer, tmp_path)
    assert before["val/exact_match"] == before["val/score"] == 0.0
    said = said_by(kept)
    assert len(said) == 24
    pictures = {name: ["nothing like it", text] for (dataset, name), text in said.items() if dataset == "pictures"}
    write_answers(meta, "pictures", dict(sorted(pictures.items())[:3]))
    others = [f"other {number}" for number in range(8)]
    texts = {name: [text, *others, text] for (dataset, name), text in said.items() if dataset == "text"}
    write_answers(meta, "text", texts)
    content = json.loads(meta.read_text())
    content["text"]["metric"] = "vqa_score"
    content["pictures"]["metric"] = "anls"
    meta.write_text(json.dumps(content))
    scores, again = validated(meta, tokenizer, tmp_path, metrics={"pictures": "exact_match"})
    assert said_by(again) == said
    assert scores["val/loss"] == before["val/loss"], "answers are no part of what is learned"
    lengths = [answer.tokens for answer in kept.answers]
    wanted = {"exact_match/pictures": 0.25, "exact_match": 0.25, "vqa_score/text": 0.6, "vqa_score": 0.6}
    wanted |= {"score": 0.425, "repeats": 0.0, "cut_off": lengths.count(4) / 24, "answer_tokens": sum(lengths) / 24}
    found = {name.removeprefix("val/"): value for name, value in scores.items() if name not in ("step", "val/loss")}
    assert found == pytest.approx(wanted)


def said_by(kept: Kept) -> dict[tuple[str, str | None], str]:
    return {(answer.record.dataset, answer.record.id): answer.generated for answer in kept.answers}


def test_wrong_answers_are_found_before_training(meta, tokenizer, tmp_path):
    write_answers(meta, "text", {"text-5": "not a list"})
    stage, data, trainer = build(meta, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"text.jsonl:6 is to be answered in validation, but 'answers' is not a list"):
        trainer.fit(stage, data)


def test_a_metric_of_a_dataset_that_is_not_answered_is_told(meta, tokenizer, tmp_path, capsys):
    stage, data, trainer = build(meta, tokenizer, tmp_path, metrics={"texts": "anls"})
    trainer.fit(stage, data)
    assert "eval.metrics names texts, but answered are: pictures, text" in " ".join(capsys.readouterr().out.split())


def test_score_and_cost_over_tile_limits(meta, tokenizer, tmp_path):
    """Pictures of 32 x 32, 64 x 32 and 40 x 70 pixels have 1 tile each at a limit of 1; at 4 the last two have 3.

    Of twelve rows three compare two pictures, for which the limit is halved. A tile is 4 tokens. At the limit of
    validation everything is as in validation.
    """
    stage, data, trainer = build(meta, tokenizer, tmp_path, tile_limits=[4, 1], callbacks=[RunProgress()])
    trainer.fit(stage, data)
    scores = trainer.validate(stage, data, verbose=False)[0]
    points = trace_tile_curve(trainer, stage, data, tmp_path)
    assert json.loads((tmp_path / TILE_CURVE_NAME).read_text()) == points
    one, four = points
    assert (one["max_tiles"], four["max_tiles"]) == (1, 4)
    corpus = data.val_corpus
    assert one["tiles"] == pytest.approx((9 * 1 + 3 * 2) / 24)
    assert four["tiles"] == pytest.approx(corpus.column("tiles").sum() / 24)
    assert four["prompt_tokens"] - one["prompt_tokens"] == pytest.approx(4 * (four["tiles"] - one["tiles"]), abs=1e-4)
    assert four["tiles"] > one["tiles"] + 0.5
    assert four["score"] == pytest.approx(scores["val/score"])
    assert four["answer_tokens"] == pytest.approx(scores["val/answer_tokens"])
    assert set(one["by_dataset"]) == {"pictures", "text"}
    assert all((point["rows"], point["left_out"]) == (24, {}) for point in points)
    assert float(trainer.callback_metrics["eval/tiles_1/prompt_tokens"]) == pytest.approx(one["prompt_tokens"])
    assert "eval/tiles_4/exact_match/text" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("cap", "rows", "datasets"),
    [
        ({"max_pack_tiles": 2}, 16, {"pictures", "text"}),
        ({"max_pack_tiles": 0}, 12, {"text"}),
        ({"max_tokens": 8}, 0, set()),
    ],
)
def test_rows_beyond_the_caps_are_left_out_at_every_limit(meta, tokenizer, tmp_path, capsys, cap, rows, datasets):
    """Two tiles at most: of twelve pictures the eight larger ones have three at a limit of 4.

    The caps are lowered behind the measuring, which would else refuse the rows. A dataset without a row has no score.
    """
    stage, data, trainer = build(meta, tokenizer, tmp_path, tile_limits=[1, 4])
    trainer.fit(stage, data)
    for name, value in cap.items():
        setattr(data.config, name, value)
    points = trace_tile_curve(trainer, stage, data, tmp_path)
    assert [point["rows"] for point in points] == ([rows] * 2 if rows else [])
    assert all(set(point["by_dataset"]) == datasets for point in points)
    assert data.left_out_at_limits == {"over_length": 24 - rows}
    told = " ".join(capsys.readouterr().out.split())
    assert f"tile curve over {rows} of 24 rows: the others do not fit at every limit" in told


def test_a_curve_needs_rows_to_answer(meta, tokenizer, tmp_path, capsys):
    stage, data, trainer = build(meta, tokenizer, tmp_path, tile_limits=[1, 4])
    data.config.generation_rows = 0
    trainer.fit(stage, data)
    assert trace_tile_curve(trainer, stage, data, tmp_path) == []
    assert json.loads((tmp_path / TILE_CURVE_NAME).read_text()) == []
    assert "no tile curve: eval.max_tiles is given, but validation answers no rows" in capsys.readouterr().out
