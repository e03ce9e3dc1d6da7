import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.conversation import encode_prompt, encode_row
from ivl_lightning.data.templates import TEMPLATES, get_template
from ivl_lightning.data.turns import last_question, parse_turns, split_last_answer
from ivl_lightning.models.tokenizer import image_token_id, load_tokenizer
from ivl_lightning.structures import RowError, Turn

FIXTURES = Path(__file__).parents[1] / "fixtures" / "conversation"
CASES = [json.loads(line) for line in (FIXTURES / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
TOKENIZERS = {name: load_tokenizer(FIXTURES / name) for name in sorted({case["tokenizer"] for case in CASES})}
QWEN2 = TOKENIZERS["qwen2_bytebpe"]
INTERNLM2 = TOKENIZERS["internlm2_vit300m"]

# Where the original silently drops every label, and what is trained here instead. An empty answer of an older template
# has no end marker, so there is nothing to train and nothing differs.
DROPPED_BY_THE_ORIGINAL = {
    ("special_tokens_in_text", "Hermes-2"): "<ref>the dog</ref><box>[[12, 34, 560, 780]]</box><|im_end|>",
    ("empty_answer", "Hermes-2"): "",
    ("empty_answer", "phi3-chat"): "",
}
PAIRS = [
    ("internvl2_5", "qwen2_bytebpe"),
    ("internvl2_5", "internlm2_vit300m"),
    ("Hermes-2", "qwen2_bytebpe"),
    ("internlm2-chat", "internlm2_vit300m"),
    ("phi3-chat", "phi3_sp"),
    ("internvl_zh", "internlm2_vit300m"),
]


def make_row(*texts: str, **fields: object) -> dict[str, object]:
    roles = ("human", "gpt")
    return {**fields, "conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]}


def case_name(case: dict) -> str:
    return f"{case['name']}-{case['template']}-{case['tokenizer']}"


def options(case: dict) -> dict:
    return {"template": case["template"], "num_image_tokens": case["num_image_tokens"]}


def trained_ids(labels: list[int]) -> list[int]:
    return [label for label in labels if label != IGNORE_INDEX]


def reason_of(row: dict[str, object], **arguments: object) -> str:
    with pytest.raises(RowError) as caught:
        encode_row(row, QWEN2, **arguments)
    return caught.value.reason


@pytest.mark.parametrize("case", [case for case in CASES if "error" not in case], ids=case_name)
def test_ids_and_labels_are_the_originals(case: dict) -> None:
    """Ids equal the original's; labels too, but for the samples of which the original drops all."""
    tokenizer = TOKENIZERS[case["tokenizer"]]
    input_ids, labels = encode_row(case["row"], tokenizer, **options(case))
    assert input_ids == case["input_ids"]
    if not case["all_labels_dropped"]:
        assert labels == case["labels"]
        return
    text = DROPPED_BY_THE_ORIGINAL[case["name"], case["template"]]
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert labels == [IGNORE_INDEX] * (len(input_ids) - len(answer)) + answer


@pytest.mark.parametrize("case", [case for case in CASES if "error" in case], ids=case_name)
def test_rows_that_crash_the_original_are_refused_with_a_reason(case: dict) -> None:
    """The original raises KeyError for a system turn with an older template; here a RowError says what to do."""
    assert case["name"] == "system_override"
    with pytest.raises(RowError, match="no place for a system turn") as caught:
        encode_row(case["row"], TOKENIZERS[case["tokenizer"]], **options(case))
    assert caught.value.reason == "system_turn"


@pytest.mark.parametrize("case", [case for case in CASES if "error" not in case], ids=case_name)
def test_prompt_is_a_prefix_of_the_training_ids(case: dict) -> None:
    """What generation starts from is what training saw before the answer: same ids, none of them trained last."""
    tokenizer = TOKENIZERS[case["tokenizer"]]
    input_ids, labels = encode_row(case["row"], tokenizer, **options(case))
    prompt = encode_prompt(case["row"], tokenizer, **options(case))
    assert prompt == input_ids[: len(prompt)]
    assert labels[len(prompt) - 1] == IGNORE_INDEX
    assert all(label != IGNORE_INDEX for label in labels[len(prompt) : len(prompt) + 1])
    question, _ = split_last_answer(case["row"])
    assert encode_prompt(question, tokenizer, **options(case)) == prompt


WORDS = st.text(alphabet="abc .,!?-猫图", min_size=1, max_size=12)


@pytest.mark.parametrize(("template", "tokenizer_name"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(exchanges=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_exactly_the_answers_and_their_end_markers_are_trained(
    template: str, tokenizer_name: str, exchanges: list[tuple[str, str]]
) -> None:
    """The trained tokens, put together, are answer + end marker of each gpt turn, and the prompt is a prefix."""
    tokenizer, chat = TOKENIZERS[tokenizer_name], get_template(template)
    row = make_row(*(text for exchange in exchanges for text in exchange))
    input_ids, labels = encode_row(row, tokenizer, template=template)
    prompt = encode_prompt(row, tokenizer, template=template)
    assert prompt == input_ids[: len(prompt)]
    answers = [answer.strip() if chat.strip else answer for _, answer in exchanges]
    # Phi-3's header swallows blanks at the start of an answer; of an answer of blanks the end marker is left.
    shown = [answer.lstrip() if template == "phi3-chat" else answer for answer in answers if answer]
    expected = "".join(chat.lead + answer + chat.answer_end for answer in shown)
    decoded = tokenizer.decode(trained_ids(labels), spaces_between_special_tokens=False)
    assert decoded.replace(" ", "") == expected.replace(" ", "")


def test_zh_template_by_hand() -> None:
    """`<human>: Q <bot>: A</s>`, BOS in front; trained is what follows `<bot>:`, so the blank that melts with A too."""
    row = make_row("Hi.", "Yes.", "And?", "No.")
    input_ids, labels = encode_row(row, INTERNLM2, template="internvl_zh")
    text = "<s><human>: Hi. <bot>: Yes.</s><human>: And? <bot>: No.</s>"
    answers = [INTERNLM2(text, add_special_tokens=False)["input_ids"] for text in (" Yes.</s>", " No.</s>")]
    assert input_ids == INTERNLM2(text, add_special_tokens=False)["input_ids"]
    assert trained_ids(labels) == answers[0] + answers[1]
    assert labels[-len(answers[1]) :] == answers[1]
    assert trained_ids(encode_row(make_row("Hi.", ""), INTERNLM2, template="internvl_zh")[1]) == []


def test_image_slots_equal_the_text_written_out() -> None:
    """One `<img>`, n context tokens and one `</img>` for each image, in the order of the images; none is trained."""
    row = make_row("<image> and <image>", "x", image=["a.jpg", "b.jpg"])
    input_ids, labels = encode_row(row, QWEN2, num_image_tokens=(3, 5))
    context = image_token_id(QWEN2)
    slots = [f"<img>{'<IMG_CONTEXT>' * count}</img>" for count in (3, 5)]
    user = f"<|im_start|>user\n{slots[0]} and {slots[1]}<|im_end|>\n"
    assert QWEN2.decode(input_ids).count(user) == 1
    assert input_ids.count(context) == 8
    assert context not in labels
    assert len(input_ids) == len(labels)


def test_one_image_takes_an_int_and_needs_no_placeholder() -> None:
    """A missing placeholder is put before the first human turn, after a system turn of the row's own."""
    bare = make_row("What?", "x", image="a.jpg")
    written = make_row("<image>\nWhat?", "x", image="a.jpg")
    assert encode_row(bare, QWEN2, num_image_tokens=4) == encode_row(written, QWEN2, num_image_tokens=[4])
    system = {"from": "system", "value": "Be brief."}
    for row in (bare, written):
        row["conversations"] = [system, *row["conversations"]]
    assert encode_row(bare, QWEN2, num_image_tokens=4) == encode_row(written, QWEN2, num_image_tokens=4)


def test_placeholder_in_a_later_turn_stays_there() -> None:
    """The original looks at the first turn only and would write a second placeholder."""
    row = make_row("Hi.", "Hi.", "<image>\nWhat?", "x", image="a.jpg")
    text = QWEN2.decode(encode_row(row, QWEN2, num_image_tokens=1)[0])
    assert "user\nHi.<|im_end|>" in text
    assert "user\n<img><IMG_CONTEXT></img>\nWhat?" in text


def test_video_becomes_numbered_frames() -> None:
    """`<video>` and its newline become one `Frame-i: <image>` line for each frame."""
    lines = "Frame-1: <image>\nFrame-2: <image>\nWhat?"
    expected = encode_row(make_row(lines, "x", image=["a", "b"]), QWEN2, num_image_tokens=(2, 2))
    for text in ("<video>\nWhat?", "What?"):
        assert encode_row(make_row(text, "x", video="v.mp4"), QWEN2, num_image_tokens=(2, 2)) == expected


def test_auto_labels_number_the_images_of_a_row_without_labels() -> None:
    """`Image-i: ` is written before each placeholder, counting over turns; `keep` writes nothing."""
    bare = make_row("<image><image> same?", "no", "And <image>?", "yes", image=["a", "b", "c"])
    labeled = make_row("Image-1: <image>Image-2: <image> same?", "no", "And Image-3: <image>?", "yes")
    labeled["image"] = ["a", "b", "c"]
    counts = (1, 2, 3)
    expected = encode_row(labeled, QWEN2, num_image_tokens=counts)
    assert encode_row(bare, QWEN2, num_image_tokens=counts, image_labels="auto") == expected
    assert encode_row(bare, QWEN2, num_image_tokens=counts) != expected


@pytest.mark.parametrize(
    "text",
    ["Image-1: <image>\nImage-2: <image>\n?", "Picture 1:<image> <image>?", "图1：<image>\n图2：<image>\n?"],
)
def test_auto_labels_leave_the_authors_own(text: str) -> None:
    """One numbered name and a colon right before a placeholder shows that the author numbers the images."""
    row = make_row(text, "x", image=["a", "b"])
    kept = encode_row(row, QWEN2, num_image_tokens=(1, 1))
    assert encode_row(row, QWEN2, num_image_tokens=(1, 1), image_labels="auto") == kept


def test_auto_labels_do_not_touch_single_images() -> None:
    """Only rows with two or more images are numbered."""
    for image in ("a.jpg", ["a.jpg"]):
        row = make_row("<image>\nWhat?", "x", image=image)
        kept = encode_row(row, QWEN2, num_image_tokens=1)
        assert encode_row(row, QWEN2, num_image_tokens=1, image_labels="auto") == kept


@pytest.mark.parametrize(
    ("row", "counts", "reason"),
    [
        ({}, (), "conversations_missing"),
        ({"conversations": []}, (), "conversations_missing"),
        ({"conversations": "Hi."}, (), "conversations_invalid"),
        ({"conversations": ["Hi."]}, (), "conversations_invalid"),
        ({"conversations": [{"from": "human", "value": None}]}, (), "conversations_invalid"),
        ({"conversations": [{"from": "user", "value": "Hi."}]}, (), "role_unknown"),
        ({"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}, (), "role_order"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, (), "role_order"),
        ({"conversations": [{"from": "system", "value": "a"}]}, (), "role_order"),
        (make_row("Hi."), (), "no_answer"),
        (make_row("Hi.", "Hi.", "And?"), (), "no_answer"),
        (make_row("<image>\n<image>\nCompare.", "x", image=["a", "b", "c"]), (1, 1, 1), "placeholder_count"),
        (make_row("<image>\n<image>\nCompare.", "x", image="a"), (1,), "placeholder_count"),
        (make_row("Compare.", "x", image=["a", "b"]), (1, 1), "placeholder_count"),
        (make_row("What does <image> do?", "x"), (), "placeholder_count"),
        (make_row("<image>\nWhat?", "<image>", image="a"), (1,), "placeholder_count"),
        (make_row("<video>What?", "x", video="v"), (1,), "placeholder_count"),
        (make_row("<video>\n<video>\nWhat?", "x", video="v"), (1,), "placeholder_count"),
        (make_row("What does <IMG_CONTEXT> do?", "It is a slot."), (), "reserved_token"),
        (make_row("Explain.", "<img> and </img> mark an image."), (), "reserved_token"),
        (make_row("What?", "x", image={"path": "a"}), (1,), "image_invalid"),
        (make_row("What?", "x", video=["v"]), (1,), "video_invalid"),
    ],
)
def test_unusable_rows_are_refused_with_a_reason(row: dict[str, object], counts: tuple[int, ...], reason: str) -> None:
    """Each fault of a row's text has its own countable reason; none is trained on."""
    assert reason_of(row, num_image_tokens=counts) == reason


def test_reserved_token_is_named() -> None:
    """The message names the token and says what to do."""
    with pytest.raises(RowError, match=r"turn 1 holds <IMG_CONTEXT>.*remove it") as caught:
        parse_turns(make_row("What does <IMG_CONTEXT> do?", "It is a slot."))
    assert caught.value.reason == "reserved_token"


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        (make_row("Hi.", "Hi."), {"num_image_tokens": 4}, "the row has 0 images"),
        (make_row("What?", "x", image="a"), {}, "the row has 1 images"),
        (make_row("What?", "x", video="v"), {}, "one number for each frame"),
        (make_row("What?", "x", image="a"), {"num_image_tokens": 0}, "at least one token"),
        (make_row("Hi.", "Hi."), {"image_labels": "always"}, "one of keep, auto"),
        (make_row("Hi.", "Hi."), {"template": "vicuna"}, "one of internvl2_5, internlm2-chat"),
    ],
)
def test_wrong_arguments_are_not_blamed_on_the_row(
    row: dict[str, object], arguments: dict[str, object], message: str
) -> None:
    """A caller's mistake is a plain ValueError, so it never ends up in the ledger of rejected rows."""
    with pytest.raises(ValueError, match=message) as caught:
        encode_row(row, QWEN2, **arguments)
    assert not isinstance(caught.value, RowError)


def test_literal_html_video_is_text_in_a_row_without_a_video() -> None:
    """`<video>` is no special token, and answers about web pages hold it."""
    row = make_row("How do I show a film?", "Use <video>.")
    assert "Use <video>." in QWEN2.decode(encode_row(row, QWEN2)[0])


def test_split_last_answer_leaves_the_row_alone() -> None:
    """The question row is a copy without the last answer; other fields stay."""
    row = make_row("a", "b", "c", "d", id="7")
    question, answer = split_last_answer(row)
    assert answer == "d"
    assert question == {"id": "7", "conversations": make_row("a", "b", "c")["conversations"]}
    assert last_question(question) == last_question(row) == "c"
    assert len(parse_turns(row)) == 4
    assert parse_turns(question, answered=False)[-1] == Turn("human", "c")


def test_template_names_are_the_official_ones() -> None:
    """The names are written in the config of released checkpoints."""
    assert list(TEMPLATES) == ["internvl2_5", "internlm2-chat", "Hermes-2", "phi3-chat", "internvl_zh"]
