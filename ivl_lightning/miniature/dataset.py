"""The miniature's pictures and rows on disk, in the official formats: meta files, JSONL, PNG."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

import PIL

from ivl_lightning.miniature import pictures, tasks
from ivl_lightning.miniature.tasks import KINDS, Example, Kind

MAX_GRID_TILES = 4
_TOLD = ("val", "train")
"""Splits whose scenes are told in words too."""
_DESCRIPTION = "dataset.json"
_MOST_DRAWS = 100
"""Draws for one row before its kind is taken to be exhausted."""

Row = dict[str, object]


def write_dataset(
    folder: Path,
    *,
    rows: int,
    val_rows: int,
    seed: int,
    tile_size: int = 64,
    pair_rows: int = 0,
    pair_val_rows: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Write pictures and rows under `folder`, or nothing if they are there for these settings already.

    `meta.json` and `val_meta.json` list one dataset for each kind, with pictures; no picture and no text-only question
    of the one is in the other. `language_meta.json` and `language_val_meta.json` ask the same questions about scenes
    told in words: scenes are coarser than pictures, so these two may share some. `pairs_meta.json` and
    `pairs_val_meta.json` hold questions that no other stage sees, for preference pairs to be made of. `dataset.json` is
    written last and holds the settings, their hash and each kind's floor.

    Args:
        folder: made if missing.
        rows: training rows of each kind.
        val_rows: validation rows of each kind.
        seed: with the code and Pillow's version, all that the content depends on.
        tile_size: side of a tile in pixels.
        pair_rows, pair_val_rows: rows of each kind for preference pairs, and for those of validation.
        advance: called after each row.

    Raises:
        ValueError: a kind has too few different examples for so many rows.
    """
    counts = {"val": val_rows, "train": rows, "pairs": pair_rows, "pairs_val": pair_val_rows}
    settings = {**counts, "seed": seed, "tile_size": tile_size}
    description = json.dumps(_describe(settings), indent=2) + "\n"
    marker = folder / _DESCRIPTION
    if marker.is_file() and marker.read_text(encoding="utf-8") == description:
        return
    marker.unlink(missing_ok=True)
    seen: set[bytes] = set()
    for split, count in counts.items():
        for name, kind in KINDS.items():
            examples = _draw_unseen(name, kind, count, Random(f"{seed}/{split}/{name}"), tile_size, seen)
            _write_kind(folder, split, name, examples, advance)
    _write_metas(folder, counts)
    # Another name until it is whole: whoever finds the description may trust what it describes.
    part = marker.with_suffix(".part")
    part.write_text(description, encoding="utf-8")
    part.replace(marker)


def language_texts(folder: Path) -> Iterator[str]:
    """Questions and answers of the language rows, for the tokenizer to learn from."""
    for file in sorted((folder / "language_train").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield from (turn["value"] for turn in json.loads(line)["conversations"])


def _describe(settings: dict[str, int]) -> Row:
    code = [inspect.getsource(module) for module in (pictures, tasks)] + [Path(__file__).read_text(encoding="utf-8")]
    facts = "".join([json.dumps(settings), PIL.__version__, *code])
    floors = {name: kind.floor for name, kind in KINDS.items()}
    return {"settings": settings, "hash": hashlib.sha256(facts.encode()).hexdigest(), "floors": floors}


def _draw_unseen(name: str, kind: Kind, count: int, rng: Random, tile_size: int, seen: set[bytes]) -> Iterator[Example]:
    """Examples none of whose pictures, or whose question if it has none, came before."""
    for _ in range(count):
        draws = (kind.draw(rng, tile_size) for _ in range(_MOST_DRAWS))
        example = next((draw for draw in draws if seen.isdisjoint(_contents(draw))), None)
        if example is None:
            raise ValueError(f"the miniature's kind {name!r} has too few different examples: ask for fewer rows")
        seen.update(_contents(example))
        yield example


def _contents(example: Example) -> set[bytes]:
    contents = [image.tobytes() for image in example.images] or [example.question.encode()]
    return {hashlib.sha256(content).digest() for content in contents}


def _write_kind(
    folder: Path, split: str, name: str, examples: Iterable[Example], advance: Callable[[], object]
) -> None:
    media = folder / split / name
    is_told = split in _TOLD
    media.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    language_rows: list[Row] = []
    for number, example in enumerate(examples):
        row_id = f"{name}-{number:05d}"
        rows.append(_row(row_id, example.question, example.answer) | _save_images(media, number, example))
        language_rows.append(_row(row_id, example.question_in_words(), example.answer))
        advance()
    _write_jsonl(folder / split / f"{name}.jsonl", rows)
    if is_told:
        _write_jsonl(folder / f"language_{split}" / f"{name}.jsonl", language_rows)


def _row(row_id: str, question: str, answer: str) -> Row:
    return {"id": row_id, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _save_images(media: Path, number: int, example: Example) -> Row:
    """Write a row's pictures; returns its `image` entry: a string for one picture, a list for several."""
    names = [f"{number:05d}-{index}.png" for index in range(len(example.images))]
    for image, name in zip(example.images, names, strict=True):
        image.save(media / name, compress_level=1)
    if not names:
        return {}
    return {"image": names[0] if len(names) == 1 else names}


def _write_jsonl(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_metas(folder: Path, counts: dict[str, int]) -> None:
    for prefix in ("", "language_"):
        train = {
            name: _entry(f"{prefix}train", name, counts["train"], kind.repeat_time) for name, kind in KINDS.items()
        }
        _write_meta(folder / f"{prefix}meta.json", train)
        _write_meta(folder / f"{prefix}val_meta.json", _entries(f"{prefix}val", counts["val"]))
    for split in ("pairs", "pairs_val"):
        if counts[split]:
            _write_meta(folder / f"{split}_meta.json", _entries(split, counts[split]))


def _write_meta(file: Path, entries: dict[str, Row]) -> None:
    file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _entries(split: str, length: int) -> dict[str, Row]:
    return {name: _entry(split, name, length, 1) for name in KINDS}


def _entry(split: str, name: str, length: int, repeat_time: float) -> Row:
    """A meta file's entry; paths are relative to the meta file's folder."""
    return {
        "root": f"{split}/{name}",
        "annotation": f"{split}/{name}.jsonl",
        "data_augment": split == "train",
        "repeat_time": repeat_time,
        "max_dynamic_patch": MAX_GRID_TILES,
        "length": length,
    }
