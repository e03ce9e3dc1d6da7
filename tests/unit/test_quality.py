"""Quality rules against numbers worked by hand; keys and duplicates."""

import json
import random

import numpy as np
import pytest

from ivl_lightning.data.quality import (
    RULES,
    QualityLimits,
    check_turns,
    excerpt,
    longest_sentence,
    longest_zeros,
    repeated_lines,
    repeated_ngrams,
    repeats_itself,
)
from ivl_lightning.reporting.audit.keys import duplicates, most_frequent, row_key, text_key
from ivl_lightning.structures import Turn


def turns(answer: str, question: str = "What is it?") -> tuple[Turn, ...]:
    return Turn("human", question), Turn("gpt", answer)


def rules(answer: str, question: str = "What is it?") -> list[str]:
    return [hit.rule for hit in check_turns(turns(answer, question))]


LINE = "it is a cat"


def test_lines_that_repeat_an_earlier_one_are_counted_without_braces():
    """Line, b, line, b, line count, the two braces do not; of five two are long enough to be repeats: 2 / 5."""
    assert repeated_lines(f"{LINE}\nb\n{LINE}\n}}\n}}\nb\n {LINE} \n") == (0.4, 2, LINE)
    assert repeated_lines("}\n}\n}\n") == (0.0, 0, "")
    assert repeated_lines("") == (0.0, 0, "")


def test_only_lines_of_four_words_or_ten_characters_repeat():
    assert repeated_lines("one two three\n" * 9) == (0.0, 0, "")
    assert repeated_lines("one two three 4\n" * 9) == (0.0, 0, "")
    assert repeated_lines("one two three four\n" * 9)[1] == 8
    assert repeated_lines("猫在桌子上睡觉了吗\n" * 9)[1] == 0
    assert repeated_lines("猫在桌子上睡觉了吗啊\n" * 9)[1] == 8


def test_few_repeated_lines_are_no_hit():
    """Of three equal lines two repeat, 2 / 3 > 0.4, but two repeats are too few; of four three do."""
    assert "repeated_lines" not in rules("\n".join([LINE] * 3))
    hit = check_turns(turns("\n".join([LINE] * 4)))[0]
    assert (hit.rule, hit.value, hit.limit, hit.text) == ("repeated_lines", 0.75, 0.4, LINE)


def test_ten_grams_of_words():
    """13 words of a and b in turn: 4 ten-grams, 2 kinds, so 2 of 4 repeat an earlier one."""
    assert repeated_ngrams("a b a b a b a b a b a b a") == (0.5, 2, "a b a b a b a b a b")


def test_an_answer_that_goes_round_in_circles():
    """14 words of a and b: 3 of 5 ten-grams repeat an earlier one; of 13 words 2 of 4, which are too few."""
    assert repeats_itself("a b " * 7)
    assert not repeats_itself("a b a b a b a b a b a b a")
    assert not repeats_itself("\n".join([LINE] * 2))
    assert not repeats_itself("")


def test_ten_grams_need_words_that_repeat():
    """Ten equal words are one ten-gram; eleven are two, of which one repeats. Numbers and rules are no words."""
    assert repeated_ngrams(" ".join("a" * 10)) == (0.0, 0, "")
    assert repeated_ngrams(" ".join("a" * 11))[:2] == (0.5, 1)
    assert repeated_ngrams("one two three four five six seven eight nine ten eleven twelve")[0] == 0.0
    assert repeated_ngrams("0 1 " * 40) == (0.0, 0, "")
    assert repeated_ngrams("| --- " * 40) == (0.0, 0, "")
    # Four words of ten are enough.
    assert repeated_ngrams("a 1 b 2 c 3 d 4 . . " * 4)[1] == 21


def test_few_repeated_ten_grams_are_no_hit():
    """Of 12 equal words 2 of 3 ten-grams repeat, of 13 words 3 of 4."""
    assert rules(" ".join("a" * 12)) == []
    assert rules(" ".join("a" * 13)) == ["repeated_ngrams"]


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
    assert longest_sentence("One. Two three! The number is called 3.14") == "The number is called 3.14"
    assert longest_sentence("一句话。另外一句话") == "另外一句话"
    assert longest_sentence("End.\nshort\nlonger line") == "longer line"
    assert longest_sentence('He said "no." Then he went on') == "Then he went on"
    assert longest_sentence("यह है। चित्र सुंदर है", above=8) == "चित्र सुंदर है"
    assert longest_sentence("第一项；第二项说明；好") == "第二项说明"
    assert longest_sentence("") == ""


def test_only_prose_has_sentences():
    """Without a mark there are none, and of 10 characters 8 must be letters or blanks."""
    assert longest_sentence("words off a sign") == ""
    assert longest_sentence("Yes. abcdef g12") == "abcdef g12"
    assert longest_sentence("Yes. abcdef 123") == ""


def test_a_long_sentence_and_a_long_answer():
    limits = QualityLimits(sentence_characters=20, answer_characters=30)
    assert not check_turns(turns("Yes. " + "x" * 20), limits)
    (hit,) = check_turns(turns("Yes. " + "x" * 21), limits)
    assert (hit.rule, hit.value, hit.limit) == ("sentence_length", 21, 20)
    hits = check_turns(turns("Word. " * 6), limits)
    # 36 characters, the blank behind the last point left out.
    assert [(hit.rule, hit.value) for hit in hits] == [("answer_length", 35)]


def test_an_empty_answer_is_of_abnormal_length():
    (hit,) = check_turns(turns(" \n"))
    assert (hit.rule, hit.value, hit.limit) == ("answer_length", 0, 1)


def test_runs_of_zeros():
    assert longest_zeros("100 and 5000") == (9, 3)
    assert longest_zeros("0x00000000 and 00") == (15, 2)
    assert longest_zeros("none") == (0, 0)
    assert rules("0" * 32) == []
    (hit,) = check_turns(turns("The code is 7" + "0" * 33 + "."))
    assert (hit.rule, hit.value, hit.limit) == ("zeros", 33, 32)
    assert hit.text.startswith("The code is 70000")


def test_placeholders_and_system_turns_are_no_text():
    """24 pictures on lines of their own repeat the placeholder rightly; nobody trains on a system turn."""
    assert rules("Two cats.", "<image>\n" * 24 + "How many?") == []
    assert check_turns((Turn("system", "0" * 99), *turns("Yes."))) == ()


_RANDOM = random.Random(0)


def number() -> int:
    return _RANDOM.randint(0, 999)


ORDINARY = {
    "latex": "\\begin{tabular}{|c|c|}\n" + "".join(f"\\hline\n{i} & {number()} \\\\\n" for i in range(12)),
    "pretty html": "<table>\n" + "".join(f"<tr>\n<td>{i}</td>\n<td>{number()}</td>\n</tr>\n" for i in range(12)),
    "html on a line": "<table>" + "".join(f"<tr><td>{i}</td><td>{number()}</td></tr>" for i in range(40)),
    "boxes": json.dumps([[number() for _ in range(4)] for _ in range(60)]),
    "pretty boxes": json.dumps(
        [{"bbox_2d": [number() for _ in range(4)], "label": "car"} for _ in range(20)], indent=1
    ),
    "json": json.dumps([{"text": f"word{i}", "box": [i, i + 1, i + 2, i + 3]} for i in range(40)]),
    "empty cells": "| a | b | c | d |\n|---|---|---|---|\n" + "".join(f"| {i} |  |  |  |\n" for i in range(10)),
    "wide table": f"{'| a ' * 12}|\n{'| --- ' * 12}|\n{'| 1 ' * 12}|",
    "yes or no": "Yes\nNo\nYes\nNo\nYes\nYes",
    "receipt": "Coffee\n2.50\n1\nTea\n2.50\n1\nCake\n2.50\n1\nTOTAL\n7.50",
    "ocr on a line": " ".join("".join(_RANDOM.choices("abcdefghij", k=5)) for _ in range(200)),
    "thai": "ภาพนี้แสดงให้เห็นถึงวัดที่สวยงาม " + "".join(_RANDOM.choices("กขคงจฉชซฌญ", k=1200)),
    "hindi": " ".join(f"यह एक बहुत सुंदर चित्र है संख्या {i}।" for i in range(60)),
    "chinese list": "；".join(f"第{i}项说明内容如下所示各有不同" for i in range(80)),
    "python": "\n".join(
        f"def f{i}(x):\n    if x is None:\n        return None\n    return x + {i}\n" for i in range(6)
    ),
    "lua": "\n".join(f"if a{i} then\n  b{i}()\nelse\n  c()\nend" for i in range(6)),
    "javascript": "\n".join(f"case {i}:\n  foo({i});\n  break;" for i in range(10)),
    "board": "R N B Q K B N R\nP P P P P P P P\n" + ". . . . . . . .\n" * 4 + "p p p p p p p p\nr n b q k b n r",
    "matrix": "\n".join(" ".join(str(int(i == j)) for j in range(8)) for i in range(8)),
    "laughter": "哈" * 11,
    "address": "The address is 0x0000000000000000.",
    "binary": "The word is " + "0" * 31 + "1.",
    "quadrillions": "10000000000000000 is ten quadrillion",
    "formula": "So: $$" + " + ".join(f"a_{{{i}}} x^{{{i}}}" for i in range(100)) + "$$. Done.",
    "speech": " ".join(f'He said "{i} is here."' for i in range(80)),
    "numbered": "\n".join(f"{i}. 是" for i in range(10)),
    "svg": "A path. M " + " ".join(f"{number()},{number()}" for _ in range(200)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_training_data_have_no_hit(name):
    assert rules(ORDINARY[name]) == []


def test_ordinary_texts_have_no_hit():
    poem = "The sun is up, the sky is blue,\nit's beautiful and so are you.\nThe sun is up, the sky is blue."
    code = "for i in range(3):\n    if i:\n        print(i)\n    else:\n        print(0)\n"
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n|---|---|\n|---|---|\n"
    for text in (poem, code, table, "A cat.", "图中的运动员在庆祝。他穿红白相间的球衣。"):
        assert rules(text) == []


def test_every_rule_has_a_name():
    text = "Start. " + "no end " * 200 + "\n" + f"{LINE}\n" * 200 + "0" * 40
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
