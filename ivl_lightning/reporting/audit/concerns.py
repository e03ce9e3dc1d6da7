"""Warnings: what is allowed, but worth a person's look before days of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ivl_lightning.reporting.audit.findings import Concern
from ivl_lightning.reporting.audit.headers import (
    EXIF,
    GRAY16,
    LARGEST_ASPECT,
    SHRUNK,
    SMALL,
    SMALLEST_SIDE,
    STRETCHED,
)
from ivl_lightning.reporting.audit.rejected import LONG_PICTURES
from ivl_lightning.reporting.audit.scan import SAME_ANSWERS, SAME_IMAGES
from ivl_lightning.reporting.audit.subject import Subject

FEWEST_ROWS = 20
"""Shares of fewer rows say nothing."""
SAME_IMAGES_SHARE, SAME_ANSWERS_SHARE, DOMINANT_SHARE = 0.2, 0.5, 0.9
FEWEST_LABELS = 2
"""A word and the end marker."""


def concerns_of(subject: Subject) -> list[Concern]:
    """All warnings of a dataset."""
    return [concern for check in _CHECKS for concern in check(subject)]


def _video(subject: Subject) -> Iterator[Concern]:
    if subject.videos and subject.spec.data_augment:
        yield subject.concern(
            "video_augmented",
            subject.videos,
            "video rows, and data_augment is true: each frame would be degraded by JPEG compression",
            "set data_augment to false; keep pictures in a dataset of their own",
        )
    if subject.videos and subject.max_tiles > 1:
        yield subject.concern(
            "video_tiles",
            subject.videos,
            f"video rows, and {subject.tile_setting}; the official setting for video is a max_dynamic_patch of 1",
            "set max_dynamic_patch to 1; keep pictures in a dataset of their own",
        )


def _no_augmentation(subject: Subject) -> Iterator[Concern]:
    if subject.pictures and not subject.spec.data_augment:
        apart = "keep videos in a dataset of their own and " if subject.videos else ""
        yield subject.concern(
            "not_augmented",
            subject.pictures,
            "rows with pictures, and data_augment is false; the official recipes degrade pictures by JPEG compression",
            f"{apart}set data_augment to true, unless these pictures must stay as they are",
        )


def _largest_row(subject: Subject) -> Iterator[Concern]:
    """A picture cut into as many tiles as allowed has to fit a pack."""
    grid, config = subject.max_tiles, subject.config
    tiles = grid + 1 if config.use_thumbnail and grid > 1 else grid
    tokens = tiles * subject.tokens_per_tile
    most = min(config.max_tokens, config.max_sample_tokens or config.max_tokens)
    fits = tiles <= config.max_pack_tiles and tokens <= most
    if config.over_length == "shrink":
        yield from _shrunk(subject, fits=fits)
    elif subject.pictures and not fits:
        long = subject.remark(LONG_PICTURES)
        yield subject.concern(
            "tiles_over_pack",
            long.rows,
            f"rows with pictures are rejected as over_length: {subject.tile_setting}, which allows {tiles} tiles and "
            f"{tokens:,} tokens for one picture, but a pack holds {config.max_pack_tiles} tiles, and a row may have "
            f"{most:,} tokens",
            "lower max_dynamic_patch, raise data.max_pack_tiles or data.max_tokens, or set data.over_length=shrink",
            long.example,
        )


def _shrunk(subject: Subject, *, fits: bool) -> Iterator[Concern]:
    """Rows that lose resolution so that they fit a pack; `fits` where a single picture of full size would."""
    shrunk = subject.remark(SHRUNK)
    if shrunk.rows or (subject.pictures and not fits):
        yield subject.concern(
            "shrunk" if fits else "tiles_over_pack",
            shrunk.rows,
            f"rows have pictures that are shrunk: {subject.tile_setting}, more than a row or a pack holds, and "
            f"data.over_length=shrink cuts them into fewer tiles{_unchecked(subject)}",
            "lower max_dynamic_patch, or raise data.max_pack_tiles or data.max_tokens to keep the detail",
            shrunk.example,
        )


def _approximate(subject: Subject) -> Iterator[Concern]:
    if subject.uncertain:
        first = subject.uncertain[0]
        yield subject.concern(
            "approximate_tokens",
            len(subject.uncertain),
            "rows are rejected as over_length by another tokenizer than the model's, so that is not certain; they do "
            "not count for the verdict",
            "give model.tokenizer",
            f"line {first.line}",
        )


def _unchecked(subject: Subject) -> str:
    """How many pictures nothing can be said about."""
    count = subject.scan.unchecked
    return f" ({count:,} pictures behind URLs were not looked at)" if count else ""


_PICTURE_REMARKS = (
    (
        EXIF,
        "rows with a picture that its EXIF block wants turned; it is read lying, as in the original",
        "set data.exif_transpose=true to read such pictures upright",
    ),
    (
        GRAY16,
        "rows with a 16-bit gray picture; values above 255 become white, as in the original",
        "set data.gray16=scale to keep the contrast",
    ),
    (
        SMALL,
        f"rows with a picture of a side below {SMALLEST_SIDE} pixels, less than one token of the model covers",
        "look whether these are pictures at all",
    ),
    (
        STRETCHED,
        f"rows with a picture more than {LARGEST_ASPECT} times as long as wide; cutting it into tiles distorts it",
        "cut such pictures into parts, or leave the rows out",
    ),
)


def _pictures(subject: Subject) -> Iterator[Concern]:
    for name, message, advice in _PICTURE_REMARKS:
        remark = subject.remark(name)
        if remark.rows:
            yield subject.concern(name, remark.rows, message + _unchecked(subject), advice, remark.example)


def _few_labels(subject: Subject) -> Iterator[Concern]:
    few = np.flatnonzero(subject.index.columns["labels"] < FEWEST_LABELS)
    if len(few):
        yield subject.concern(
            "few_labels",
            len(few),
            f"rows with fewer than {FEWEST_LABELS} trained tokens: an empty answer, or one that was cut off",
            "write an answer, or leave the rows out",
            f"line {int(subject.index.columns['line'][few[0]])}",
        )


def _sameness(subject: Subject) -> Iterator[Concern]:
    images, answers = subject.remark(SAME_IMAGES), subject.remark(SAME_ANSWERS)
    rows = len(subject.index)
    if rows < FEWEST_ROWS:
        return
    if images.rows > SAME_IMAGES_SHARE * rows:
        yield subject.concern(
            SAME_IMAGES,
            images.rows,
            f"rows show one and the same picture or video, {images.rows / rows:.0%} of the dataset",
            "look whether the right files are named; join such rows to one conversation",
            images.example,
        )
    if answers.rows > SAME_ANSWERS_SHARE * rows:
        yield subject.concern(
            SAME_ANSWERS,
            answers.rows,
            f"rows have one and the same last answer, {answers.rows / rows:.0%} of the dataset",
            "a model learns to give it without looking: balance the answers",
            answers.example,
        )


def _mixture(subject: Subject) -> Iterator[Concern]:
    facts = subject.facts
    if facts.samples == 0:
        yield subject.concern(
            "no_samples",
            facts.used,
            f"usable rows with repeat_time {facts.repeat_time:g} give no sample in an epoch",
            "raise repeat_time, mend the rows, or remove the dataset from the meta file",
        )
    if facts.shares["tokens"] > DOMINANT_SHARE and not subject.alone:
        yield subject.concern(
            "dominant",
            facts.used,
            f"rows make {facts.shares['tokens']:.1%} of all tokens of an epoch; the other datasets hardly count",
            "lower its repeat_time, or raise that of the others",
        )


def _broken(subject: Subject) -> Iterator[Concern]:
    """The rows that were not opened break as often as those that were."""
    facts, config = subject.facts, subject.config
    if not facts.opened or facts.opened >= len(subject.index):
        return
    share = facts.broken / facts.opened
    if share > config.reject_limit:
        yield subject.concern(
            "broken_when_opened",
            facts.broken,
            f"rows broke of {facts.opened:,} that were opened: about {share * len(subject.index):,.0f} of all "
            f"{len(subject.index):,} may, {share:.1%}, and the limit is {config.reject_limit:.1%}",
            "run the audit with rows=null to find them all",
        )


def _quality(subject: Subject) -> Iterator[Concern]:
    if subject.flagged:
        first = subject.flagged[0]
        rows = len({line.line for line in subject.flagged})
        yield subject.concern(
            "quality",
            rows,
            "rows break a rule on text quality; they are listed below",
            "look at them; drop=FILE writes those that are to be left out, for data.exclude",
            f"line {first.line}: {first.message}",
        )


_CHECKS: tuple[Callable[[Subject], Iterator[Concern]], ...] = (
    _mixture,
    _video,
    _no_augmentation,
    _largest_row,
    _approximate,
    _pictures,
    _few_labels,
    _sameness,
    _broken,
    _quality,
)
