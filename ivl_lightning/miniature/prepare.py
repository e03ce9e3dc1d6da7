"""Everything the miniature needs before its first stage: pictures, rows and a tokenizer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress

from ivl_lightning.data.templates import get_template
from ivl_lightning.miniature.dataset import language_texts, write_dataset
from ivl_lightning.miniature.tasks import KINDS
from ivl_lightning.miniature.tokenizer import train_tokenizer

TEMPLATE = "internvl2_5"
_PATIENCE = 1.0
"""Seconds before a progress bar is worth showing."""


def prepare(
    folder: str | Path,
    *,
    rows: int = 2000,
    val_rows: int = 100,
    pair_rows: int = 0,
    pair_val_rows: int = 0,
    seed: int = 0,
    tile_size: int = 64,
) -> None:
    """Make the dataset, and the tokenizer in `folder/tokenizer`; what is there for these settings is kept.

    A call that is killed leaves nothing that a later one would take for whole.

    Args:
        folder: made if missing.
        rows, val_rows: rows of each kind of question.
        pair_rows, pair_val_rows: the same for preference pairs.
        seed: of all random choices.
        tile_size: side of a tile in pixels.

    Raises:
        ValueError: a kind of question has too few different examples for so many rows.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"rows": rows, "val_rows": val_rows, "pair_rows": pair_rows, "pair_val_rows": pair_val_rows}
    with _late_progress_bar("Drawing the miniature's pictures", len(KINDS) * sum(counts.values())) as advance:
        write_dataset(folder, **counts, seed=seed, tile_size=tile_size, advance=advance)
    _ensure_tokenizer(folder)


def _ensure_tokenizer(folder: Path) -> None:
    """Train the tokenizer unless it was trained on the dataset that is there."""
    description, trained_on = folder / "dataset.json", folder / "tokenizer" / "trained_on.json"
    if trained_on.is_file() and trained_on.read_bytes() == description.read_bytes():
        return
    trained_on.unlink(missing_ok=True)
    train_tokenizer(folder / "tokenizer", _corpus(folder))
    # Copied last and under another name until whole: it says that the tokenizer's own files are complete.
    part = trained_on.with_suffix(".part")
    shutil.copyfile(description, part)
    part.replace(trained_on)


def _corpus(folder: Path) -> Iterator[str]:
    """The rows' text and the template's fixed text, which then costs few tokens."""
    template = get_template(TEMPLATE)
    yield from (template.system_text, "system\n", "user\n", "assistant\n")
    yield from language_texts(folder)


@contextmanager
def _late_progress_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each unit of work; a bar appears once that has taken a while."""
    begin = time.monotonic()
    progress = Progress()
    task = progress.add_task(title, total=total)

    def advance() -> None:
        progress.advance(task)
        if not progress.live.is_started and time.monotonic() - begin > _PATIENCE:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
