"""What an answer is made of, what counts as right, and the scores of a set of answers."""

import pytest
import torch

from ivl_lightning.data.truths import truths_of
from ivl_lightning.inference.answers import decode_answers
from ivl_lightning.stages.answer_scores import AnswerScores
from ivl_lightning.structures import Answer, PromptBatch, Record, RowError

TURNS = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "two"}]


def record(dataset: str = "d", **row: object) -> Record:
    return Record(dataset, "d.jsonl", 1, {"conversations": TURNS, **row})


def answer(dataset: str, generated: str, *truths: str, tokens: int = 1, cut_off: bool = False) -> Answer:
    return Answer(record(dataset), "How many?", "two", truths, generated, tokens, cut_off, prompt_tokens=9, tiles=2)


def test_truths_are_the_listed_answers_or_the_last_one():
    assert truths_of({"conversations": TURNS}) == ("two",)
    assert truths_of({"conversations": TURNS, "answers": ["2", "a pair"]}) == ("2", "a pair")


@pytest.mark.parametrize("wrong", ["2", [], [2], [["2"]], {"a": "2"}, 0])
def test_answers_are_a_list_of_texts(wrong):
    with pytest.raises(RowError, match="write a list of texts") as caught:
        truths_of({"conversations": TURNS, "answers": wrong})
    assert caught.value.reason == "answers_invalid"


def test_an_answer_ends_at_the_end_marker(tokenizer):
    """Three rows of four new tokens: two and the marker, four without a marker, and one that is not counted."""
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    x, y = tokenizer.convert_tokens_to_ids(["x", "y"])
    batch = PromptBatch(
        input_ids=torch.zeros(3, 5, dtype=torch.int64),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        pixel_values=torch.empty(3, 3, 32, 32, dtype=torch.uint8),
        tiles=(0, 3, 0),
        expected=("two", "two", "two"),
        records=(record(), record(answers=["2"]), record()),
        counted=(True, True, False),
    )
    first, second = decode_answers(
        torch.tensor([[x, y, stop, stop], [x, x, x, y], [stop] * 4]), batch, tokenizer, [stop]
    )
    assert (first.generated, first.tokens, first.cut_off, first.tiles) == ("xy", 2, False, 0)
    assert (second.generated, second.tokens, second.cut_off, second.tiles) == ("xxxy", 4, True, 3)
    assert (first.prompt_tokens, second.prompt_tokens) == (3, 5)
    assert (first.truths, second.truths, second.expected) == (("two",), ("2",), "two")
    assert first.question == "How many?"


def test_scores_by_dataset_by_metric_and_over_all():
    """a: 1 of 2; b: 0 of 1; c by ANLS: 1 - 1 / 4. Exact match of two: (1/2 + 0) / 2; of all: (1/2 + 0 + 3/4) / 3.

    Of four answers one repeats itself and one is cut off; tokens (1 + 2 + 3 + 6) / 4.
    """
    scores = AnswerScores()
    for dataset, metric in (("a", "exact_match"), ("b", "exact_match"), ("c", "anls")):
        scores.add(dataset, metric)
    scores.update([answer("a", "2", "two", "2"), answer("a", "3", "2", tokens=2, cut_off=True)])
    scores.update([answer("c", "blux", "blue", tokens=3), answer("b", "a b " * 20, "2", tokens=6)])
    found = {name: value.item() for name, value in scores.compute().items()}
    assert found == pytest.approx(
        {
            "exact_match/a": 0.5,
            "exact_match/b": 0.0,
            "anls/c": 0.75,
            "exact_match": 0.25,
            "anls": 0.75,
            "score": 1.25 / 3,
            "repeats": 0.25,
            "cut_off": 0.25,
            "answer_tokens": 3.0,
        }
    )


def test_scores_count_anew_and_add_a_dataset_once():
    scores = AnswerScores(("tiles", "prompt_tokens"))
    assert scores.compute() == {}
    scores.add("a.b", "exact_match")
    scores.add("a.b", "anls")
    scores.update([answer("a.b", "2", "2")])
    scores.reset()
    scores.update([answer("a.b", "3", "2")])
    found = {name: value.item() for name, value in scores.compute().items()}
    assert found == {"exact_match/a.b": 0.0, "exact_match": 0.0, "score": 0.0, "tiles": 2.0, "prompt_tokens": 9.0}
