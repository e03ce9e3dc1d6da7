"""Sample cards in W&B and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from ivl_lightning.data.sample_file import SAMPLES_NAME, SampleCard, read_cards

TABLE = "probe"
_GAP = 8


def log_cards(loggers: Sequence[Logger], cards: Sequence[SampleCard], folder: Path) -> None:
    """Show the cards of one step wherever a logger can show pictures.

    Args:
        loggers: of the trainer.
        cards: of one step; the file in `folder` has them already.
        folder: with samples.jsonl and the pictures.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, cards, folder)
        elif isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger, cards, folder)


def _to_wandb(logger: WandbLogger, cards: Sequence[SampleCard], folder: Path) -> None:
    """A table: a row for each row, its answers of all steps so far side by side, and the score of the last one."""
    # Imported late: it is not there where nobody asked for it.
    import wandb

    every = read_cards(folder / SAMPLES_NAME)
    steps = sorted({card.step for card in every})
    generated = {(card.row, card.step): card.generated for card in every}
    columns = ["dataset", "line", "pictures", "question", "expected", *(f"step {step}" for step in steps)]
    rows = [
        [
            card.dataset,
            card.line,
            None if (sheet := _sheet(card, folder)) is None else wandb.Image(sheet),
            card.question,
            card.expected,
            *(generated.get((card.row, step), "") for step in steps),
            card.metric,
            card.score,
        ]
        for card in cards
    ]
    logger.log_table(TABLE, columns=[*columns, "metric", "last score"], data=rows, step=cards[0].step)


def _to_tensorboard(logger: TensorBoardLogger, cards: Sequence[SampleCard], folder: Path) -> None:
    """The texts of a row under one name, step after step, and its pictures once."""
    writer = logger.experiment
    for card in cards:
        name = f"{TABLE}/{card.dataset}/{card.line}"
        text = f"**{card.question}**\n\nexpected: {card.expected}\n\ngenerated: {card.generated} ({card.score:.2f})"
        writer.add_text(name, text, card.step)
        sheet = _sheet(card, folder) if card.step == 0 else None
        if sheet is not None:
            writer.add_image(name, np.asarray(sheet), card.step, dataformats="HWC")


def _sheet(card: SampleCard, folder: Path) -> Image.Image | None:
    """All pictures of a card, one below the other; None for text."""
    pictures = [Image.open(folder / place.file).convert("RGB") for place in card.pictures]
    if not pictures:
        return None
    size = max(one.width for one in pictures), sum(one.height + _GAP for one in pictures) - _GAP
    sheet = Image.new("RGB", size, "white")
    top = 0
    for one in pictures:
        sheet.paste(one, (0, top))
        top += one.height + _GAP
    return sheet
