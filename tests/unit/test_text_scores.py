"""Scores of single answers, each worked by hand."""

import pytest

from ivl_lightning.metrics.text_scores import anls, choice, exact, number, options_of, relaxed

LINES = "Which one?\nA. a cat\nB. a dog\nC: two birds"
INLINE = "Which one? (A) a cat (B) a dog (C) two birds"


@pytest.mark.parametrize(("answer", "truth", "score"), [(" Red\n", "red", 1), ("red.", "red", 0), ("", "", 1)])
def test_exact(answer, truth, score):
    assert exact(answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("95", "100", 1),  # 5 % below
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),  # 5 % of 0 are nothing
        ("1,234", "1234.0", 1),
        ("12,34", "1234", 0),  # no thousands
        ("50%", "0.5", 1),  # 50 / 100
        ("50 %", "49%", 1),  # 0.01 / 0.49 = 2 %
        ("50", "50%", 0),  # 50 against 0.5
        ("nan", "5", 0),
        ("Yes", "yes", 1),
        ("red", "5", 0),
        ("1e3", "1000", 1),
    ],
)
def test_relaxed(answer, truth, score):
    assert relaxed(answer, truth) == score


def test_years_are_met_exactly_on_request():
    assert relaxed("2013", "2020") == 1  # 7 / 2020 = 0.35 %
    assert relaxed("2013", "2020", exact_years=True) == 0
    assert relaxed("2020", "2020", exact_years=True) == 1
    assert relaxed("2019", "2020.5", exact_years=True) == 1


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("kitten", "kitten", 1.0),
        ("sitting", "kitten", 1 - 3 / 7),  # 3 edits, 7 characters
        ("Helo", "hello", 1 - 1 / 5),
        ("ab", "ax", 0.0),  # 1 / 2 is no longer below 0.5
        ("", "ab", 0.0),
        ("", "", 1.0),
    ],
)
def test_anls_is_a_similarity(answer, truth, score):
    assert anls(answer, truth) == pytest.approx(score)


@pytest.mark.parametrize("spelling", ["B", "b", "(B)", "B.", "B)", "(B) a dog", "B: a dog", "B：狗", "a dog", "A DOG "])
@pytest.mark.parametrize("question", [LINES, INLINE])
def test_spellings_of_an_option(spelling, question):
    assert choice(spelling, "B", question) == 1
    assert choice("B", spelling, question) == 1
    assert choice(spelling, "C", question) == 0


def test_a_sentence_is_no_letter():
    assert choice("A dog is there", "A", LINES) == 0
    assert choice("e.g. a dog", "E", LINES) == 0
    assert choice("", "A", LINES) == 0
    assert choice("a dog", "a dog") == 1  # no options: texts are compared
    assert choice("J", "J") == 1


def test_options():
    expected = {"A": "a cat", "B": "a dog", "C": "two birds"}
    assert options_of(LINES) == options_of(INLINE) == expected
    assert options_of("Is it vitamin A or vitamin B?") == {}


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [("3.1409", "3.14", 1), ("3.142", "3.14", 0), ("1,000", "1000", 1), ("pi", "Pi", 1), ("pi", "3.14", 0)],
)
def test_number(answer, truth, score):
    assert number(answer, truth) == score
