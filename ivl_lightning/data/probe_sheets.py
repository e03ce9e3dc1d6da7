"""The pictures of a probe set as the model gets them, in small files."""

from __future__ import annotations

from pathlib import Path

from ivl_lightning.data.contact_sheet import save_sheet
from ivl_lightning.data.picture_tiles import picture_tiles
from ivl_lightning.data.probe import ProbeSet
from ivl_lightning.data.sample_file import SHEETS_FOLDER, SheetPlace


def save_sheets(probe: ProbeSet, folder: Path) -> dict[int, list[SheetPlace]]:
    """Write a contact sheet of each picture, below `folder`/probe.

    Args:
        probe: the rows.
        folder: of the stage.

    Returns:
        Row of the corpus -> its sheets, in the order of the question; none for text.

    Raises:
        RowError: a picture cannot be decoded.
    """
    return {row: _sheets(probe, row, folder) for row in probe.rows}


def _sheets(probe: ProbeSet, row: int, folder: Path) -> list[SheetPlace]:
    dataset, record = probe.corpus.locate(row)
    encoder = probe.corpus.encoders[dataset]
    pictures = picture_tiles(encoder, record, encoder.encode_prompt(record)[1])
    names = [
        save_sheet(picture, folder / SHEETS_FOLDER, f"{record.digest}-{number}")
        for number, picture in enumerate(pictures)
    ]
    return [
        SheetPlace(f"{SHEETS_FOLDER}/{name}", picture.name, picture.note)
        for name, picture in zip(names, pictures, strict=True)
    ]
