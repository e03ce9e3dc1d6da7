"""`ivl-audit stage=mixed_preference`: preference pairs are looked at as training would take them."""

import json
import subprocess
import sys

import pytest

from tests import tiny
from tests.commands import ROOT, environment

PROSE = "The picture shows a cat that sleeps on a red chair beside the window of a small room"
LOOP = " ".join([PROSE] * 8)


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """Five good pairs, of which two share a question and its chosen answer, and one bad pair of each kind."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny.write_tiny_data(folder)
    rows = [
        {"id": "plain", "image": "0.png", "question": "What?", "chosen": "A cat.", "rejected": "A dog."},
        {"id": "other", "image": "0.png", "question": "What?", "chosen": "A cat.", "rejected": "A cow."},
        {"id": "again", "image": "0.png", "question": "What?", "chosen": "A cat.", "rejected": "A cow."},
        {"id": "bad rejected", "question": "Tell.", "chosen": PROSE, "rejected": LOOP},
        {"id": "bad chosen", "question": "Tell more.", "chosen": LOOP, "rejected": PROSE},
        {"id": "equal", "question": "Same?", "chosen": "Yes.", "rejected": "Yes. "},
        {"id": "empty", "question": "Empty?", "chosen": "Yes.", "rejected": " "},
        {"id": "no picture", "image": "gone.png", "question": "What?", "chosen": "A cat.", "rejected": "A dog."},
        {"id": "not a text", "question": "What?", "chosen": ["A cat."], "rejected": "A dog."},
        {"id": "long", "question": "Go on.", "chosen": LOOP * 40, "rejected": "No."},
        {"id": "conversation", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"root": ".", "annotation": "pairs.jsonl", "data_augment": False, "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps({"pairs": entry}))
    command = [sys.executable, "-m", "ivl_lightning.cli.audit", "stage=mixed_preference"]
    options = [f"data.meta={folder}/meta.json", f"output={folder}/audit", f"model.tokenizer={tiny.TOKENIZER}"]
    result = subprocess.run(
        [*command, *options, "data.max_tokens=8192"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    return json.loads((folder / "audit/audit.json").read_text()), (folder / "audit/audit.html").read_text()


def test_each_bad_pair_is_listed_with_its_reason(audit):
    found = {line["id"]: line["reason"] for line in audit[0]["rejected"]}
    assert found == {
        "equal": "equal_responses",
        "empty": "empty_response",
        "no picture": "file_missing",
        "not a text": "pair_invalid",
        "long": "over_length",
        "conversation": "pair_invalid",
    }
    assert audit[0]["counts"]["pairs"] == {"rows": 11, "used": 5, "rejected": 6}


def test_quality_rules_look_at_what_is_learned(audit):
    """A rejected answer may loop; a chosen one may not. Pairs with another rejected answer are no duplicates."""
    hits = {(line["id"], line["rule"]) for line in audit[0]["quality"]["hits"]}
    assert ("again", "duplicate") in hits
    assert ("other", "duplicate") not in hits
    assert {row for row, rule in hits if rule == "repeated_ngrams"} == {"bad chosen"}


def test_the_forecast_is_that_of_the_preference_plan(audit):
    """Five pairs are one step of at most 256, whatever number of packs they need."""
    assert (audit[0]["packing"]["steps"], audit[0]["packing"]["samples"]) == (1, 5)
    assert "the chosen one stands first" in audit[1]
