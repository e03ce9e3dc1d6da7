"""Pictures of sample cards, small enough to be embedded in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ivl_lightning.data.media import MediaError, MediaReader

_LARGEST_SIDE = 360
_SMALL_SIDE = 128
_ENLARGED_SIDE = 160


@dataclass(frozen=True, slots=True)
class CardPicture:
    """A picture of a card.

    Attributes:
        source: data URI; None where the picture could not be read.
        width: pixels on the page.
        enlarged: whether one pixel of the picture covers several of the page.
        note: its place, or why it could not be read.
    """

    source: str | None
    width: int
    enlarged: bool
    note: str


def picture_reader(config: Mapping[str, Any]) -> MediaReader:
    """A reader that takes what the stage itself could read; places in sample cards are absolute.

    Args:
        config: the stage's settings.
    """
    data = config.get("data", {})
    known = ("max_pixels", "exif_transpose", "gray16")
    options = {name: data[name] for name in known if name in data}
    schemes = tuple(data.get("allowed_schemes", ()))
    return MediaReader("/", allowed_schemes=schemes, follow_symlinks=True, **options)


def card_picture(place: str, reader: MediaReader) -> CardPicture:
    """Read a picture: small ones as they are and shown enlarged, large ones shrunk."""
    try:
        image = reader.load_image(place)
    except MediaError as error:
        return CardPicture(source=None, width=0, enlarged=False, note=error.message)
    side = max(image.size)
    if side > _LARGEST_SIDE:
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    # The shorter side decides: a row of tiles is many pixels wide and as coarse as one tile.
    times = max(_ENLARGED_SIDE // image.height, 1) if min(image.size) <= _SMALL_SIDE else 1
    drawing = io.BytesIO()
    kind = "jpeg" if side > _LARGEST_SIDE else "png"
    image.save(drawing, format=kind)
    source = f"data:image/{kind};base64,{base64.b64encode(drawing.getvalue()).decode()}"
    return CardPicture(source=source, width=image.width * times, enlarged=times > 1, note=place)
