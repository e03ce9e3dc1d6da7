"""Quality rules against numbers worked by hand; keys and duplicates."""

import numpy as np
import pytest

from ivl_lightning.data.quality import (
    RULES,
    QualityLimits,
    check_turns,
    duplicates,
    excerpt,
    longest_sentence,
    longest_zeros,
    most_frequent,
    repeated_lines,
    repeated_ngrams,
    row_key,
    text_key,
)
from ivl_lightning.structures import Turn


def turns(answer: str, question: str = "What is it?") -> tuple[Turn, ...]:
    return Turn("human", question), Turn("gpt", answer)


def rules(answer: str, question: str = "What is it?") -> list[str]:
    return [hit.rule for hit in check_turns(turns(answer, question))]


def test_lines_that_repeat_an_earlier_one_are_counted_without_braces():
    """a, b, a, a count, the two braces do not; the second and the third a repeat the first: 2 / 4."""
    assert repeated_lines("a\nb\na\n}\n}\n a \n") == (0.5, 2, "a")
    assert repeated_lines("}\n}\n}\n") == (0.0, 0, "")
    assert repeated_lines("") == (0.0, 0, "")


def test_few_repeated_lines_are_no_hit():
    """Of three equal lines two repeat, 2 / 3 > 0.4, but two repeats are too few; of four three do."""
    assert "repeated_lines" not in rules("yes\nyes\nyes")
    (hit,) = check_turns(turns("yes\nyes\nyes\nyes"))
    assert (hit.rule, hit.value, hit.limit, hit.text) == ("repeated_lines", 0.75, 0.4, "yes")


def test_ten_grams_of_words():
    """13 words of a and b in turn: 4 ten-grams, 2 kinds, so 2 of 4 repeat an earlier one."""
    share, ngram = repeated_ngrams("a b a b a b a b a b a b a")
    assert share == 0.5
    assert ngram == "a b a b a b a b a b"


def test_ten_grams_need_two_to_repeat():
    """Ten equal words are one ten-gram; eleven are two, of which one repeats."""
    assert repeated_ngrams(" ".join("a" * 10)) == (0.0, "")
    assert repeated_ngrams(" ".join("a" * 11))[0] == 0.5
    assert repeated_ngrams("one two three four five six seven eight nine ten eleven twelve")[0] == 0.0


def test_ten_grams_of_chinese_are_of_characters():
    """12 characters without a blank: 3 ten-grams; of 猫 and 狗 in turn the third repeats the first: 1 / 3."""
    assert repeated_ngrams("猫狗" * 6)[0] == pytest.approx(1 / 3)
    # As words it would be one word.
    assert repeated_ngrams("ab" * 600)[0] == 0.0


def test_a_rule_names_the_worst_text_of_a_row():
    once, often = " ".join("a" * 11), " ".join("b" * 50)
    (hit,) = (hit for hit in check_turns(turns(often, once)) if hit.rule == "repeated_ngrams")
    # 41 ten-grams, all alike: 40 of them repeat.
    assert hit.value == pytest.approx(40 / 41)
    assert hit.text == "b b b b b b b b b b"


def test_sentences_end_at_marks_and_line_breaks():
    assert longest_sentence("One. Two three! 3.14 is a number") == "3.14 is a number"
    assert longest_sentence("一句话。另外一句话") == "另外一句话"
    assert longest_sentence("short\nlonger line") == "longer line"
    assert longest_sentence("") == ""


def test_a_long_sentence_and_a_long_answer():
    limits = QualityLimits(sentence_characters=20, answer_characters=30)
    assert not check_turns(turns("x" * 20), limits)
    (hit,) = check_turns(turns("x" * 21), limits)
    assert (hit.rule, hit.value, hit.limit) == ("sentence_length", 21, 20)
    hits = check_turns(turns("Word. " * 6), limits)
    # 36 characters, the blank behind the last point left out.
    assert [(hit.rule, hit.value) for hit in hits] == [("answer_length", 35)]


def test_an_empty_answer_is_of_abnormal_length():
    (hit,) = check_turns(turns(" \n"))
    assert (hit.rule, hit.value, hit.limit) == ("answer_length", 0, 1)


def test_runs_of_zeros():
    assert longest_zeros("100 and 5000") == (9, 3)
    assert longest_zeros("none") == (0, 0)
    assert rules("0" * 15) == []
    (hit,) = check_turns(turns("The code is 7" + "0" * 16 + "."))
    assert (hit.rule, hit.value, hit.limit) == ("zeros", 16, 15)
    assert hit.text.startswith("The code is 70000")


def test_placeholders_and_system_turns_are_no_text():
    """24 pictures on lines of their own repeat the placeholder rightly; nobody trains on a system turn."""
    assert rules("Two cats.", "<image>\n" * 24 + "How many?") == []
    assert check_turns((Turn("system", "0" * 99), *turns("Yes."))) == ()


def test_ordinary_texts_have_no_hit():
    poem = "The sun is up, the sky is blue,\nit's beautiful and so are you.\nThe sun is up, the sky is blue."
    code = "for i in range(3):\n    if i:\n        print(i)\n    else:\n        print(0)\n"
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n|---|---|\n|---|---|\n"
    for text in (poem, code, table, "A cat.", "图中的运动员在庆祝。他穿红白相间的球衣。"):
        assert rules(text) == []


def test_every_rule_has_a_name():
    text = "no end " * 200 + "\n" + "same line\n" * 5 + "0" * 20
    limits = QualityLimits(answer_characters=100)
    assert {hit.rule for hit in check_turns(turns(text), limits)} == set(RULES) - {"duplicate"}


def test_excerpts_are_short_and_on_one_line():
    assert excerpt("a\n b") == "a b"
    assert len(excerpt("x" * 10_000_000)) == 203


def test_keys_tell_rows_apart():
    row = turns("A cat.")
    assert row_key(row, ["/a.jpg"]) == row_key(row, ["/a.jpg"])
    assert len(row_key(row, [])) == 16
    others = [row_key(row, ["/b.jpg"]), row_key(row, []), row_key(turns("A dog."), ["/a.jpg"]), row_key(row[:1], [])]
    assert len({row_key(row, ["/a.jpg"]), *others}) == 5
    # Parts do not run together.
    assert text_key(["ab", "c"]) != text_key(["a", "bc"])


def test_duplicates_point_to_the_first_row():
    """Keys a, b, a, c, a: rows 2 and 4 repeat row 0. The order of the keys does not matter."""
    for a, b, c in ((1, 2, 3), (3, 1, 2), (2**63, 0, 5)):
        keys = np.asarray([(0, a), (0, b), (0, a), (1, a), (0, a)], dtype=np.uint64)
        keys[3] = (1, c)
        later, first = duplicates(keys)
        assert later.tolist() == [2, 4]
        assert first.tolist() == [0, 0]
    assert duplicates(np.empty((0, 2), dtype=np.uint64))[0].tolist() == []


def test_duplicates_of_many_keys_agree_with_a_dictionary():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 40, (300, 2), dtype=np.uint64)
    seen: dict[tuple[int, ...], int] = {}
    expected = []
    for row, key in enumerate(map(tuple, keys.tolist())):
        if key in seen:
            expected.append((row, seen[key]))
        seen.setdefault(key, row)
    assert list(zip(*(part.tolist() for part in duplicates(keys)), strict=True)) == expected


def test_the_most_frequent_key():
    assert most_frequent(np.asarray([5, 7, 7, 5, 7], dtype=np.uint64)) == (3, 1)
    assert most_frequent(np.empty(0, dtype=np.uint64)) == (0, 0)
