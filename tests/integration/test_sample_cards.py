"""The probe set: which rows, what is kept of their answers, and that training is the same with and without it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ivl_lightning.callbacks.card_loggers import TABLE, log_cards
from ivl_lightning.callbacks.ema import EMA
from ivl_lightning.callbacks.probing import undisturbed
from ivl_lightning.callbacks.sample_cards import SampleCards
from ivl_lightning.config.schema import EvalConfig, OptimConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.sample_file import SAMPLES_NAME, SampleCard, SheetPlace, append_cards, read_cards
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from tests import tiny
from tests.wandb_file import read_offline_run

STEPS = 4


class Watched(Callback):
    """Modes of all modules in each step, and the weights in the end."""

    def __init__(self):
        self.modes, self.weights = [], {}

    def on_before_optimizer_step(self, trainer, pl_module, *_):
        self.modes.append([part.training for part in pl_module.modules()])

    def on_train_end(self, trainer, pl_module):
        self.weights = {name: value.clone() for name, value in pl_module.root.state_dict().items()}


def fit(meta, tokenizer, folder, callbacks, *, steps=STEPS, ckpt_path=None, **changes):
    """Some steps with dropout, a frozen tower, and validation behind every third one."""
    stage = InstructionTuning(
        lambda: tiny.build_tiny_model(tokenizer),
        optim=OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
        trainable=["projector", "llm"],
        generation_tokens=4,
        evaluation=EvalConfig(metrics={"text": "anls"}),
    )
    config = tiny.tiny_data_config(meta, val_rows=8, packs_per_step=2, max_tokens=420, **changes)
    data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(stage, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return data


def steps_of(cards: list[SampleCard]) -> list[int]:
    return list(dict.fromkeys(card.step for card in cards))


@pytest.mark.parametrize("averages", [False, True])
def test_training_is_the_same_with_and_without(meta, tokenizer, tmp_path, averages):
    """Bit for bit: the weights, and the mode of each module, some of which stay in eval mode throughout."""

    def watched(cards):
        kept = Watched()
        fit(meta, tokenizer, tmp_path, [*([EMA(0.5)] if averages else []), *cards, kept])
        return kept

    without, asked = watched([]), watched([SampleCards(str(tmp_path), rows=4, every_n_steps=1)])
    assert steps_of(read_cards(tmp_path / SAMPLES_NAME)) == [0, 1, 2, 3, 4]
    assert without.modes == asked.modes
    assert len({mode for modes in asked.modes for mode in modes}) == 2
    assert without.weights.keys() == asked.weights.keys()
    assert all(torch.equal(value, asked.weights[name]) for name, value in without.weights.items())


def test_numbers_drawn_while_asking_are_drawn_again(tmp_path):
    """By what trains: sampling, or a loader that somebody adds, would draw them."""

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with undisturbed(trainer, torch.nn.Linear(1, 1)):
        while_asking = drawn()
    assert drawn() == while_asking


def test_the_same_rows_are_asked_and_shown_as_the_model_gets_them(meta, tokenizer, tmp_path):
    """Before the first step, behind the second and the fourth, and with the validation behind the third.

    By turns over the datasets; a row's tokens are those of its text and 4 for each tile; texts are scored by ANLS.
    """
    data = fit(meta, tokenizer, tmp_path, [SampleCards(str(tmp_path), rows=4, every_n_steps=2)])
    cards = read_cards(tmp_path / SAMPLES_NAME)
    assert steps_of(cards) == [0, 2, 3, 4]
    by_step = [[card for card in cards if card.step == step] for step in steps_of(cards)]
    assert all([card.row for card in asked] == [card.row for card in by_step[0]] for asked in by_step)
    assert [card.dataset for card in by_step[0]] == ["pictures", "text", "pictures", "text"]
    assert {card.metric for card in cards if card.dataset == "text"} == {"anls"}
    assert len({card.generated for card in cards}) > 4, "answers must change, or the steps would prove nothing"
    for card in by_step[0]:
        assert card.expected in card.truths
        assert card.prompt_tokens > tiny.TILE_TOKENS * card.tiles
        assert len(card.pictures) == (0 if card.dataset == "text" else card.question.count("<image>"))
    check_sheet(data, next(card for card in by_step[0] if card.pictures), tmp_path)


def check_sheet(data: DynamicPackingDataModule, card: SampleCard, folder: Path) -> None:
    """The first tile of a row's first sheet, pixel by pixel."""
    corpus = data.val_corpus
    (row,) = [row for row in range(len(corpus)) if corpus.place(row)[1].digest == card.digest]
    dataset, record = corpus.locate(row)
    tiles = corpus.encoders[dataset].encode_prompt(record)[1]
    assert card.tiles == len(tiles)
    with Image.open(folder / card.pictures[0].file) as sheet:
        shown = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
    side = tiny.TILE_SIZE
    assert torch.equal(shown[:side, :side].permute(2, 0, 1), tiles[0])


def test_a_run_that_goes_on_is_not_asked_again(meta, tokenizer, tmp_path):
    """Stopped behind step 2: the second attempt answers what the first has not, and what was left is read once."""
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(meta, tokenizer, tmp_path, [SampleCards(str(tmp_path), rows=2, every_n_steps=1), keep], steps=2)
    again = ModelCheckpoint(dirpath=tmp_path / "again", every_n_train_steps=1)
    cards = SampleCards(str(tmp_path), rows=2, every_n_steps=1)
    fit(meta, tokenizer, tmp_path, [cards, again], ckpt_path=tmp_path / "step=1.ckpt")
    lines = [json.loads(line)["step"] for line in (tmp_path / SAMPLES_NAME).read_text().splitlines()]
    assert lines == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4]
    assert [card.step for card in read_cards(tmp_path / SAMPLES_NAME)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_probe_set_of_ones_own(meta, tokenizer, tmp_path):
    """Rows of another meta.json are asked in their place, and nothing where there are none or validation has none."""
    own = tiny.write_tiny_data(tmp_path / "own", rows=3)
    fit(meta, tokenizer, tmp_path, [SampleCards(str(tmp_path), rows=99, meta=str(own))], steps=1)
    cards = read_cards(tmp_path / SAMPLES_NAME)
    assert (len(cards), {Path(card.file).parent for card in cards}) == (6, {own.parent})
    fit(meta, tokenizer, tmp_path / "none", [SampleCards(str(tmp_path / "none"), rows=0)], steps=1)
    assert not (tmp_path / "none" / SAMPLES_NAME).exists()
    (own.parent / "text.jsonl").write_text("")
    (own.parent / "pictures.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"eval\.probe_meta=.*no row that can be asked"):
        fit(meta, tokenizer, tmp_path, [SampleCards(str(tmp_path), meta=str(own))], steps=1)


@pytest.mark.parametrize("wrong", [{"rows": -1}, {"every_n_steps": 0}])
def test_wrong_settings_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"rows=.* every_n_steps="):
        SampleCards(str(tmp_path), **wrong)


# -- loggers ----------------------------------------------------------------------------------------------------------


def asked(folder: Path, step: int, generated: str) -> list[SampleCard]:
    """Cards of a step, written to the file: a row with two pictures and one with none."""
    places = []
    for number, color in enumerate(("red", "blue")):
        file = folder / "probe" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), color).save(file)
        places.append(SheetPlace(f"probe/{number}.png", "a.png", "grid 2 x 1"))
    common = {"step": step, "file": "val.jsonl", "digest": "d", "truths": ["red"], "metric": "anls", "expected": "red"}
    common |= {"tiles": 2, "prompt_tokens": 9, "generated": generated, "score": float(generated == "red")}
    cards = [
        SampleCard(dataset="pictures", line=1, question="Which?", pictures=places, **common),
        SampleCard(dataset="text", line=2, question="And?", **common),
    ]
    append_cards(folder / SAMPLES_NAME, cards)
    return cards


def test_table_in_wandb(tmp_path, monkeypatch):
    """Read back from the offline run: the last table has the answers of both steps side by side.

    The two pictures of a row are one below the other, 20 pixels wide and 10 + 8 + 10 high. W&B keeps pictures of tables
    in a folder of its own until they are sent.
    """
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    logger = WandbLogger(save_dir=tmp_path, offline=True, id="probe")
    for step, generated in ((0, "blue"), (5, "red")):
        log_cards([logger], asked(tmp_path, step, generated), tmp_path)
    wandb.finish()
    # Its process writes behind ours, and ends with all that was said.
    wandb.teardown()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    history = read_offline_run(next(folder.glob("*.wandb"))).history
    assert [row["trainer/global_step"] for row in history] == [0, 5]
    table = json.loads((folder / "files" / history[-1][f"{TABLE}/path"]).read_text())
    first = ["dataset", "line", "pictures", "question", "expected"]
    assert table["columns"] == [*first, "step 0", "step 5", "metric", "last score"]
    assert table["data"][1] == ["text", 2, None, "And?", "red", "blue", "red", "anls", 1.0]
    assert table["data"][0][5:] == ["blue", "red", "anls", 1.0]
    assert sizes_below(tmp_path / "staged") == {(20, 28)}


def sizes_below(folder: Path) -> set[tuple[int, int]]:
    """Of the pictures among all files, which bear no names that tell."""
    found = set()
    for file in folder.rglob("*"):
        if file.is_file() and file.read_bytes().startswith(b"\x89PNG"):
            with Image.open(file) as image:
                found.add(image.size)
    return found


def test_texts_and_pictures_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    for step, generated in ((0, "blue"), (5, "red")):
        log_cards([logger], asked(tmp_path, step, generated), tmp_path)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    (picture,) = events.Images("probe/pictures/1")
    assert (picture.width, picture.height) == (20, 28)
    texts = events.Tensors("probe/pictures/1/text_summary")
    assert [event.step for event in texts] == [0, 5]
    assert "generated: red (1.00)" in texts[1].tensor_proto.string_val[0].decode()
    assert events.Tags()["images"] == ["probe/pictures/1"]
