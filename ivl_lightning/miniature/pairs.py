"""The miniature's preference pairs: its own stage-2 model answers questions that no stage has seen, right and wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.config.schema import DataConfig, ModelConfig
from ivl_lightning.curation.build import build_pairs
from ivl_lightning.data.turns import last_question, split_last_answer
from ivl_lightning.miniature.dataset import MAX_GRID_TILES
from ivl_lightning.miniature.prepare import TEMPLATE, prepare
from ivl_lightning.miniature.tasks import KINDS
from ivl_lightning.models.build import load_model
from ivl_lightning.models.tokenizer import load_tokenizer

PAIRS_FOLDER = "pairs_made"
COUNTS_NAME = "counts.json"
SPLITS = ("pairs", "pairs_val")
_PERTURBED = "perturbed"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PairSettings:
    """How pairs are made.

    Attributes:
        samples: answers to each question, at temperature 1.
        max_pairs: pairs of a question at most.
        fewest: pairs for training; where the model errs too seldom, wrong answers are taken from other questions.
        fewest_val: the same for validation.
    """

    samples: int = 16
    max_pairs: int = 3
    fewest: int = 200
    fewest_val: int = 60


def prepare_pairs(
    folder: str | Path, *, weights: str, seed: int = 0, pairs: dict[str, int] | None = None, **options: Any
) -> None:
    """Make preference pairs in `folder/pairs_made`, as `ivl-preferences` does; what is there for these weights is kept.

    `pairs_meta.json` and `pairs_val_meta.json` there name a dataset for each kind of question, `counts.json` holds how
    many pairs the model gave and how many are perturbed.

    Args:
        folder: of the miniature's data; made if missing.
        weights: folder of the model that answers.
        seed: of all random choices.
        pairs: fields of `PairSettings`.
        **options: of `prepare`.

    Raises:
        ValueError: no model in `weights`, or too few different answers.
    """
    folder = Path(folder)
    prepare(folder, seed=seed, **options)
    settings = PairSettings(**(pairs or {}))
    target = folder / PAIRS_FOLDER
    of = {"weights": weights, "changed": _changed(Path(weights)), "seed": seed, "pairs": repr(settings)}
    made_of = json.dumps({**of, "data": options}, sort_keys=True)
    marker = target / "made_of.json"
    if marker.is_file() and marker.read_text(encoding="utf-8") == made_of:
        return
    shutil.rmtree(target, ignore_errors=True)
    counts = {split: _make(folder, split, weights, seed, settings) for split in SPLITS}
    (target / COUNTS_NAME).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    # Written last: whoever finds it may trust what it describes.
    marker.write_text(made_of, encoding="utf-8")


def _changed(weights: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(weights.glob("*.safetensors"))]


def _make(folder: Path, split: str, weights: str, seed: int, settings: PairSettings) -> dict[str, dict[str, int]]:
    """Pairs of one split; returns counts by kind of question."""
    source = folder / f"{split}_meta.json"
    model, tokenizer = load_model(weights), load_tokenizer(weights)
    config = PreferencesConfig(
        output=str(folder / PAIRS_FOLDER / f"{split}_answers"),
        model=ModelConfig(path=weights, template=TEMPLATE),
        data=DataConfig(
            meta=str(source), tile_size=_tile_size(folder), max_tiles=MAX_GRID_TILES, num_workers=0, index_workers=1
        ),
        prompt="plain",
        samples=settings.samples,
        samples_per_batch=None,
        max_new_tokens=12,
        max_pairs=settings.max_pairs,
        batch_size=50,
        seed=seed,
        device="cpu",
    )
    build_pairs(config, model, tokenizer)
    answers = Path(config.output)
    made = {name: _read_lines(answers / f"{name}.jsonl") for name in KINDS}
    fewest = settings.fewest if split == "pairs" else settings.fewest_val
    perturbed = _perturbed(folder, split, made, fewest - sum(map(len, made.values())), Random(f"{seed}/{split}"))
    entries = json.loads(source.read_text(encoding="utf-8"))
    for name, entry in entries.items():
        file = folder / PAIRS_FOLDER / split / f"{name}.jsonl"
        rows = [*made[name], *perturbed[name]]
        _write_lines(file, rows)
        entry |= {
            "root": str(folder.absolute() / entry["root"]),
            "annotation": str(file.absolute()),
            "length": len(rows),
        }
    meta = {name: entry for name, entry in entries.items() if entry["length"]}
    (folder / PAIRS_FOLDER / f"{split}_meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return {name: {"model": len(made[name]), _PERTURBED: len(perturbed[name])} for name in KINDS}


def _perturbed(folder: Path, split: str, made: dict[str, list[Row]], wanted: int, rng: Random) -> dict[str, list[Row]]:
    """Pairs of the right answer and of one to another question of the kind, for questions without a pair, in turn."""
    chosen: dict[str, list[Row]] = {name: [] for name in KINDS}
    spare = {name: _unpaired(_read_lines(folder / split / f"{name}.jsonl"), made[name]) for name in KINDS}
    for _ in range(max(wanted, 0)):
        name = max(spare, key=lambda kind: len(spare[kind]))
        if not spare[name]:
            raise ValueError(f"the miniature has too few rows for {wanted} more preference pairs: raise pair_rows")
        row = spare[name].pop(0)
        truth = split_last_answer(row)[1]
        answers = {split_last_answer(other)[1] for other in _read_lines(folder / split / f"{name}.jsonl")} - {truth}
        chosen[name].append(_pair(row, truth, rng.choice(sorted(answers))))
    return chosen


def _unpaired(rows: list[Row], pairs: list[Row]) -> list[Row]:
    paired = {pair["source"]["line"] for pair in pairs}
    return [row for line, row in enumerate(rows, start=1) if line not in paired]


def _pair(row: Row, chosen: str, rejected: str) -> Row:
    media = {"image": row["image"]} if "image" in row else {}
    answers = {"question": last_question(row), "chosen": chosen, "rejected": rejected}
    return {"id": f"{row['id']}-{_PERTURBED}", **media, **answers, "answer_gt": chosen, "method": _PERTURBED}


def _tile_size(folder: Path) -> int:
    return int(json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["settings"]["tile_size"])


def _read_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write_lines(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
