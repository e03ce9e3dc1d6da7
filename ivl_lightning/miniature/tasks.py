"""The miniature's kinds of question: each a pure function of a random generator and the tile size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image

from ivl_lightning.constants import IMAGE_PLACEHOLDER
from ivl_lightning.miniature.pictures import CIRCLE, COLORS, SHAPE_NAMES, SKETCH_CELLS, Picture

COLOR_NAMES = tuple(COLORS)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("black", "blue")
MAX_COUNT = 6
ROW_LENGTH = 3
SPELLED_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its pictures.

    Attributes:
        images: pictures in the order of the question's placeholders.
        sketches: each picture's scene in words.
        question: what the human says, with a placeholder for each picture.
        answer: the whole expected answer.
    """

    images: tuple[Image.Image, ...]
    sketches: tuple[str, ...]
    question: str
    answer: str

    def question_in_words(self) -> str:
        """The question with each picture told in words: what a language model can learn before it sees."""
        text = self.question
        for sketch in self.sketches:
            text = text.replace(IMAGE_PLACEHOLDER, f" {sketch}", 1)
        return text


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question.

    Attributes:
        draw: makes an example from a random generator and the tile size.
        floor: share of right answers when the most common answer is always given.
        repeat_time: share of its rows in an epoch of the mixture: kinds that are soon learned take less.
    """

    draw: Callable[[Random, int], Example]
    floor: float
    repeat_time: float


def draw_color(rng: Random, tile_size: int) -> Example:
    """Name the color of one shape."""
    color = rng.choice(COLOR_NAMES)
    picture = _shape_picture(rng, tile_size, rng.choice(SHAPE_NAMES), color)
    return _ask([picture], "What color is the shape?", color)


def draw_shape(rng: Random, tile_size: int) -> Example:
    """Name one shape."""
    shape = rng.choice(SHAPE_NAMES)
    picture = _shape_picture(rng, tile_size, shape, rng.choice(COLOR_NAMES))
    return _ask([picture], "What shape is it?", shape)


def draw_count(rng: Random, tile_size: int) -> Example:
    """Count dots of one color."""
    number = rng.randint(1, MAX_COUNT)
    picture = Picture(1, tile_size, rng)
    color = rng.choice(COLOR_NAMES)
    # A dot fills one cell of the sketch: what a context token sees is then what a word tells.
    cell = tile_size // SKETCH_CELLS
    for place in rng.sample(range(SKETCH_CELLS**2), number):
        left, top = place % SKETCH_CELLS * cell, place // SKETCH_CELLS * cell
        picture.add_shape(CIRCLE, color, (left, top, left + cell, top + cell), smallest=0.6, largest=0.8)
    return _ask([picture], "How many dots are there?", str(number))


def draw_position(rng: Random, tile_size: int) -> Example:
    """Tell the quarter in which a shape lies."""
    row, column = rng.choice(("top", "bottom")), rng.choice(("left", "right"))
    half = tile_size // 2
    left, top = half * (column == "right"), half * (row == "bottom")
    picture = Picture(1, tile_size, rng)
    shape, color = rng.choice(SHAPE_NAMES), rng.choice(COLOR_NAMES)
    picture.add_shape(shape, color, (left, top, left + half, top + half), smallest=0.5, largest=0.9)
    return _ask([picture], "Where is the shape?", f"{row} {column}")


def draw_digit(rng: Random, tile_size: int) -> Example:
    """Read one rendered digit."""
    value = rng.randrange(len(DIGIT_NAMES))
    picture = Picture(1, tile_size, rng)
    box = (0, 0, tile_size, tile_size)
    picture.add_text(str(value), rng.choice(INKS), box, words=(DIGIT_NAMES[value],), smallest=0.85, largest=0.95)
    return _ask([picture], "Which digit is it?", str(value))


def draw_which(rng: Random, tile_size: int) -> Example:
    """Name the color in one of two pictures."""
    colors = rng.sample(COLOR_NAMES, 2)
    pictures = [_shape_picture(rng, tile_size, rng.choice(SHAPE_NAMES), color) for color in colors]
    asked = rng.randrange(len(colors))
    return _ask(pictures, f"What color is the shape in Image-{asked + 1}?", colors[asked])


def draw_row(rng: Random, tile_size: int) -> Example:
    """Name the colors of a row of shapes on a wide picture, one to a tile."""
    colors = rng.choices(COLOR_NAMES, k=ROW_LENGTH)
    picture = Picture(ROW_LENGTH, tile_size, rng)
    for index, color in enumerate(colors):
        box = (index * tile_size, 0, (index + 1) * tile_size, tile_size)
        picture.add_shape(rng.choice(SHAPE_NAMES), color, box, smallest=0.75, largest=0.95)
    return _ask([picture], "Name the colors from left to right.", " ".join(colors))


def draw_spell(rng: Random, tile_size: int) -> Example:
    """Write spelled digits as a number: text only."""
    values = rng.choices(range(len(DIGIT_NAMES)), k=SPELLED_DIGITS)
    spelled = " ".join(DIGIT_NAMES[value] for value in values)
    return _ask([], f"Write in digits: {spelled}", "".join(map(str, values)))


KINDS: dict[str, Kind] = {
    "color": Kind(draw_color, floor=1 / len(COLOR_NAMES), repeat_time=0.5),
    "shape": Kind(draw_shape, floor=1 / len(SHAPE_NAMES), repeat_time=1),
    "count": Kind(draw_count, floor=1 / MAX_COUNT, repeat_time=1),
    "position": Kind(draw_position, floor=1 / 4, repeat_time=1),
    "digit": Kind(draw_digit, floor=1 / len(DIGIT_NAMES), repeat_time=1),
    "which": Kind(draw_which, floor=1 / len(COLOR_NAMES), repeat_time=0.5),
    "row": Kind(draw_row, floor=len(COLOR_NAMES) ** -ROW_LENGTH, repeat_time=0.5),
    "spell": Kind(draw_spell, floor=len(DIGIT_NAMES) ** -SPELLED_DIGITS, repeat_time=0.5),
}


def _shape_picture(rng: Random, tile_size: int, shape: str, color: str) -> Picture:
    picture = Picture(1, tile_size, rng)
    picture.add_shape(shape, color, (0, 0, tile_size, tile_size), smallest=0.75, largest=0.95)
    return picture


def _ask(pictures: list[Picture], question: str, answer: str) -> Example:
    images = tuple(picture.image for picture in pictures)
    sketches = tuple(picture.sketch() for picture in pictures)
    return Example(images, sketches, _slots(len(pictures)) + question, answer)


def _slots(num_pictures: int) -> str:
    """The placeholders before a question; several pictures are numbered, as in the official multi-image rows."""
    if num_pictures == 1:
        return f"{IMAGE_PLACEHOLDER}\n"
    return "".join(f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, num_pictures + 1))
