"""Scores, by hand."""

import pytest

from ivl_lightning.metrics.exact_match import ExactMatch


def test_exact_match_by_hand():
    """Three of four: equal, equal but for blanks at the ends, and equal; 'Red' is not 'red'."""
    score = ExactMatch()
    score.update(["3", " a dog \n"], ["3", "a dog"])
    score.update(["Red", ""], ["red", ""])
    assert score.compute().item() == pytest.approx(3 / 4)


def test_case_can_be_ignored():
    score = ExactMatch(ignore_case=True)
    score.update(["Red "], ["red"])
    assert score.compute().item() == 1.0


def test_nothing_counted_is_zero_and_reset_forgets():
    score = ExactMatch()
    assert score.compute().item() == 0.0
    score.update(["a"], ["a"])
    score.reset()
    assert score.compute().item() == 0.0


def test_answers_and_expected_must_pair():
    with pytest.raises(ValueError, match="zip"):
        ExactMatch().update(["a"], [])
