"""Contact sheets of a stage's probe set, embedded in a page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ivl_lightning.data.sample_file import SheetPlace

_SMALL_SIDE = 128
_ENLARGED_SIDE = 128
_WIDEST = 288


@dataclass(frozen=True, slots=True)
class Sheet:
    """A picture of a row, as the model got it.

    Attributes:
        source: data URI; None where the file is gone.
        width: pixels on the page.
        enlarged: whether one pixel of the picture covers several of the page.
        name: path of the picture in the row.
        note: size and grid, or that the file is gone.
    """

    source: str | None
    width: int
    enlarged: bool
    name: str
    note: str


def embedded(place: SheetPlace, folder: Path) -> Sheet:
    """A contact sheet for a page: a small one enlarged by a whole number.

    Args:
        place: of the sheet.
        folder: of the stage.
    """
    file = folder / place.file
    if not file.is_file():
        return Sheet(None, 0, False, place.name, f"{place.file} is gone")
    with Image.open(file) as image:
        width, height = image.size
    # The shorter side decides: a row of tiles is many pixels wide and as coarse as one tile.
    times = max(min(_ENLARGED_SIDE // height, _WIDEST // width), 1) if min(width, height) <= _SMALL_SIDE else 1
    kind = "jpeg" if file.suffix == ".jpg" else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    return Sheet(source, width * times, times > 1, place.name, place.note)
