"""Pictures of colored shapes and rendered digits, and the same scenes written as grids of words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
Words = tuple[str, ...]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 200, 20),
    "purple": (140, 50, 170),
    "orange": (250, 125, 10),
    "brown": (110, 65, 30),
    "black": (20, 20, 20),
}
CIRCLE = "circle"
CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": (
        *((0.3, 0), (0.7, 0), (0.7, 0.3), (1, 0.3), (1, 0.7), (0.7, 0.7)),
        *((0.7, 1), (0.3, 1), (0.3, 0.7), (0, 0.7), (0, 0.3), (0.3, 0.3)),
    ),
}
"""Corners of each shape in a unit box; the circle is the one shape without corners."""
SHAPE_NAMES = (CIRCLE, *CORNERS)

SKETCH_CELLS = 4
"""Cells on a side of a tile's sketch: one for each context token of a tile."""
EMPTY_CELL: Words = (".",)
_SEEN_SHARE = 0.2
"""Share of a cell that a mark must cover to be told there."""


class Picture:
    """A picture one tile high that remembers what was drawn where.

    Args:
        tiles: width in tiles.
        tile_size: side of a tile in pixels.
        rng: makes every random choice: the pale background now, sizes and places later.
    """

    def __init__(self, tiles: int, tile_size: int, rng: Random) -> None:
        self._tiles = tiles
        self._tile_size = tile_size
        self._rng = rng
        background = (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255))
        self.image = Image.new("RGB", (tiles * tile_size, tile_size), background)
        self._draw = ImageDraw.Draw(self.image)
        self._marks: list[tuple[Box, Words]] = []

    def add_shape(self, shape: str, color: str, slot: Box, *, smallest: float, largest: float) -> None:
        """Draw a filled shape somewhere in `slot`, its side between two shares of the slot's."""
        left, top, right, bottom = box = self._place(slot, smallest, largest)
        if shape == CIRCLE:
            self._draw.ellipse(box, fill=COLORS[color])
        else:
            corners = [(left + x * (right - left), top + y * (bottom - top)) for x, y in CORNERS[shape]]
            self._draw.polygon(corners, fill=COLORS[color])
        self._marks.append((box, (color, shape)))

    def add_text(self, text: str, color: str, slot: Box, *, words: Words, smallest: float, largest: float) -> None:
        """Write `text` as large as fits into a square placed as in `add_shape`; `words` tell it in the sketch."""
        left, top, right, bottom = box = self._place(slot, smallest, largest)
        center = ((left + right) / 2, (top + bottom) / 2)
        self._draw.text(center, text, fill=COLORS[color], font=_largest_font(text, right - left), anchor="mm")
        self._marks.append((box, words))

    def sketch(self) -> str:
        """The scene as words, one for each context token: tile after tile, then the thumbnail of a wide picture."""
        views = [(index * self._tile_size, self._tile_size) for index in range(self._tiles)]
        if self._tiles > 1:
            views.append((0, self._tiles * self._tile_size))
        return " ".join(word for left, width in views for word in self._words_of_view(left, width))

    def _place(self, slot: Box, smallest: float, largest: float) -> Box:
        left, top, right, bottom = slot
        side = self._rng.randint(round(smallest * (right - left)), round(largest * (right - left)))
        # Pillow draws a box's right and bottom edge too, so a box may at most end one pixel before its slot does.
        x = self._rng.randint(left, right - side - 1)
        y = self._rng.randint(top, bottom - side - 1)
        return x, y, x + side, y + side

    def _words_of_view(self, left: int, width: int) -> Iterator[str]:
        """Words of the part of the picture from column `left` on, row by row."""
        cell_width, cell_height = width / SKETCH_CELLS, self._tile_size / SKETCH_CELLS
        for row, column in itertools.product(range(SKETCH_CELLS), repeat=2):
            words = self._words_of_cell(left + column * cell_width, row * cell_height, cell_width, cell_height)
            # Neighboring cells tell different words of the same mark, so that a few cells tell them all.
            yield words[(row + column) % len(words)]

    def _words_of_cell(self, left: float, top: float, width: float, height: float) -> Words:
        """Words of the mark that covers most of a cell."""
        best, best_area = EMPTY_CELL, _SEEN_SHARE * width * height
        for box, words in self._marks:
            area = _overlap(left, left + width, box[0], box[2]) * _overlap(top, top + height, box[1], box[3])
            if area > best_area:
                best, best_area = words, area
        return best


def _overlap(start: float, end: float, other_start: float, other_end: float) -> float:
    """Length that two intervals share."""
    return max(0.0, min(end, other_end) - max(start, other_start))


@lru_cache(maxsize=1024)
def _largest_font(text: str, side: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The bundled font in the largest size whose `text` fits into a square."""
    return next(font for font in map(ImageFont.load_default, range(2 * side, 0, -1)) if _fits(font, text, side))


def _fits(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, side: int) -> bool:
    left, top, right, bottom = font.getbbox(text)
    return right - left <= side and bottom - top <= side
