"""Sample cards: answered questions of a stage's last validation, each marked right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ivl_lightning.constants import IMAGE_PLACEHOLDER
from ivl_lightning.data.media import MediaReader
from ivl_lightning.reporting.pictures import CardPicture, card_picture, picture_reader
from ivl_lightning.reporting.run_folder import StageFolder

FEW = 8
"""Cards of a stage that is not the last one."""


@dataclass(frozen=True, slots=True)
class Card:
    """An answered question.

    Attributes:
        dataset: it comes from.
        line: of the dataset's file.
        pictures: in the order of the question.
        question: what was asked.
        expected: answer in the data.
        generated: answer of the model.
        right: whether the two are equal, by the rule of the exact-match score.
    """

    dataset: str
    line: int
    pictures: list[CardPicture]
    question: str
    expected: str
    generated: str
    right: bool


@dataclass(frozen=True, slots=True)
class CardDeck:
    """Cards of one stage.

    Attributes:
        stage: its name.
        step: of the validation.
        kept: answers the stage kept of that validation.
        right: of these.
        cards: those that are shown.
    """

    stage: str
    step: int
    kept: int
    right: int
    cards: list[Card]


def card_decks(stages: Sequence[StageFolder]) -> list[CardDeck]:
    """All cards of the last stage that has some, and a few of every stage before it."""
    answered = [stage for stage in stages if stage.samples]
    return [_deck(stage, None if stage is answered[-1] else FEW) for stage in answered]


def _deck(stage: StageFolder, limit: int | None) -> CardDeck:
    samples = stage.last_samples()
    reader = picture_reader(stage.config)
    shown = samples if limit is None else _mixed(samples)[:limit]
    return CardDeck(
        stage=stage.name,
        step=samples[-1]["step"],
        kept=len(samples),
        right=sum(_right(sample) for sample in samples),
        cards=[_card(sample, reader) for sample in shown],
    )


def _mixed(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each dataset in turn, so that the first few show many kinds."""
    by_dataset: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_dataset.setdefault(sample["dataset"], []).append(sample)
    return [sample for sample in chain.from_iterable(zip_longest(*by_dataset.values())) if sample is not None]


def _card(sample: dict[str, Any], reader: MediaReader) -> Card:
    pictures = [card_picture(place, reader) for place in sample["images"]]
    question = sample["question"]
    if len(pictures) == 1:
        # With several pictures the placeholders say which one is meant; a single one stands beside the question.
        question = question.replace(IMAGE_PLACEHOLDER, "").strip()
    return Card(
        dataset=sample["dataset"],
        line=sample["line"],
        pictures=pictures,
        question=question,
        expected=sample["expected"],
        generated=sample["generated"],
        right=_right(sample),
    )


def _right(sample: dict[str, Any]) -> bool:
    return sample["generated"].strip() == sample["expected"].strip()
