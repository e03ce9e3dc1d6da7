"""A model and a row that do not go together: its loss is no number. And what must be told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLForConditionalGeneration

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from tests import tiny
from tests.commands import own_arguments

POISON = "z"
ROW = "text.jsonl:13"
STEPS = 4


def poisoned_arguments(folder: Path) -> list[str]:
    """A model whose embedding of one token is no number, and data in which one row has that token; what trains it."""
    given = own_arguments(folder, steps=STEPS)
    row = {
        "id": "poison",
        "conversations": [{"from": "human", "value": f"Say {POISON}."}, {"from": "gpt", "value": "1"}],
    }
    data = folder / "data"
    assert POISON not in "".join(file.read_text() for file in data.glob("*.jsonl"))
    with (data / "text.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    (token,) = tiny.load_tiny_tokenizer()(POISON).input_ids
    model = InternVLForConditionalGeneration.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.language_model.get_input_embeddings().weight[token, 0] = torch.nan
    model.save_pretrained(folder / "model")
    return [
        *given,
        "recipe=none",
        "model.template=internvl2_5",
        "data.packs_per_step=4",
        f"data.cache_dir={folder}/index",
        "trainer.checkpoint_every_n_steps=1",
        "trainer.progress_bar=false",
        "optim.warmup_steps=0",
        "seed=3",
        "+callbacks.recorder={_target_: tests.faults.bad_step_cases.Recorder}",
    ]


def planned_step(config: DataConfig, seed: int) -> int:
    """The step that trains on the poisoned row, from the plan alone."""
    data = DynamicPackingDataModule(config, tiny.load_tiny_tokenizer(), seed=seed, patch_size=tiny.PATCH_SIZE)
    data.setup("fit")
    assert data.train_corpus is not None
    names = [data.train_corpus.place(row)[1] for row in range(len(data.train_corpus))]
    (poisoned,) = [row for row, record in enumerate(names) if f"{record.file}:{record.line}".endswith(ROW)]
    data.stream.begin(0)
    return next(planned.step for planned in data.stream.packs(0, 1) if poisoned in planned.pack.samples)


def check_file(file: Path, step: int, ranks: int) -> None:
    """It names one sample that is not finite, on one rank, and the language model's gradient."""
    content = json.loads(file.read_text())
    assert (content["epoch"], content["step_of_epoch"], content["global_step"]) == (0, step, step)
    assert "llm" in content["not_finite"]
    assert content["norms"]["llm"] == "nan"
    micro_batches = content["micro_batches"]
    places = [(micro["rank"], micro["micro_step"]) for micro in micro_batches]
    assert places == [(rank, micro) for rank in range(ranks) for micro in range(4 // ranks)]
    bad = [sample for micro in micro_batches for sample in micro["samples"] if sample["loss"] == "nan"]
    assert [(sample["dataset"], sample["sample"].rpartition("/")[2]) for sample in bad] == [("text", ROW)]
    (micro_batch,) = [micro for micro in micro_batches if bad[0] in micro["samples"]]
    assert [micro["loss"] == "nan" for micro in micro_batches] == [micro is micro_batch for micro in micro_batches]
    assert all(sample["tokens"] > sample["labels"] > 0 for micro in micro_batches for sample in micro["samples"])


def check_same(file: Path, original: dict[str, Any]) -> None:
    """Bits of the gradients, and of the losses and samples of rank 0, of a step that was run again where it stood."""
    again = json.loads(file.read_text())
    assert again["steps_behind"] == 0
    assert again["not_finite"] == []
    assert sum(again["gradient_checksums"].values()) == original["gradients"]
    ranks = len({micro["rank"] for micro in again["micro_batches"]})
    own = [micro for micro in again["micro_batches"] if micro["rank"] == 0]
    assert [micro["loss"] * ranks for micro in own] == original["losses"]
    assert [sample["sample"] for micro in own for sample in micro["samples"]] == original["samples"]
