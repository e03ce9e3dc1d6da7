"""`data.expected_rows`: are these the data that a recipe's numbers belong to?"""

import json
import re

import pytest

from ivl_lightning.data.datamodule import DynamicPackingDataModule
from tests import tiny

ROWS = {"pictures": 12, "text": 12}


def read(meta, tokenizer, expected, **changes):
    config = tiny.tiny_data_config(meta, expected_rows=expected, **changes)
    return DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE).read_corpora(progress=False)


def test_rows_that_are_expected(meta, tokenizer):
    """12 rows each, one of them broken: rows count before they are rejected. No rule, no check."""
    file = meta.parent / "text.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], "{broken"]))
    train, _ = read(meta, tokenizer, ROWS)
    assert (train.sizes, len(train.rejects)) == ((12, 11), 1)
    read(meta, tokenizer, None)


def test_every_difference_is_named(meta, tokenizer):
    """A dataset that is missing, one too many and one of another size, each with its rows."""
    content = json.loads(meta.read_text())
    content["more"] = content["text"]
    meta.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data\.expected_rows says") as caught:
        read(meta, tokenizer, {"pictures": 13, "chartqa": 18317, "text": 12})
    for fault in (
        "chartqa is missing, 18,317 rows expected",
        "more is not expected, it has 12 rows",
        "pictures has 12 rows, 13 expected",
    ):
        assert fault in str(caught.value)
    assert not re.search(r"\btext\b", str(caught.value))


def test_validation_data_are_not_compared(meta, tokenizer):
    read(meta, tokenizer, ROWS, val_meta=str(meta))
    only_text = meta.with_name("val.json")
    only_text.write_text(json.dumps({"text": json.loads(meta.read_text())["text"]}))
    read(meta, tokenizer, ROWS, val_meta=str(only_text))
