"""Preference rows -> ids, labels and pixels: a shared prompt, two answers, and a reason for each bad row."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.collate_pairs import checksum
from ivl_lightning.data.conversation import encode_prompt, encode_row, tokenize_row
from ivl_lightning.data.pair_dataset import PairDataset
from ivl_lightning.data.pairs import conversations_of, tokenize_pair
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.data.templates import TEMPLATES
from ivl_lightning.structures import Pack, PlannedPack, RowError
from tests import tiny
from tests.unit.test_conversation import PAIRS, TOKENIZERS

WORDS = st.text(alphabet="abc .,!?-猫图\n", min_size=1, max_size=12).filter(str.strip)


@pytest.fixture
def pairs(tmp_path):
    return tiny.write_tiny_pairs(tmp_path / "data")


def module(meta, tokenizer, *, seed=0, template="internvl2_5", **changes):
    config = tiny.tiny_data_config(meta, **{"max_tokens": 1200, "batch_pairs": 6, "packs_per_step": 2, **changes})
    data = PreferenceDataModule(config, tokenizer, seed=seed, template=template, patch_size=tiny.PATCH_SIZE)
    data.setup("fit")
    return data


def write_rows(folder, rows, **meta):
    """One data set of these rows (or of raw lines) beside the tiny pictures."""
    tiny.write_tiny_data(folder, rows=4)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    entry = {"root": ".", "annotation": "rows.jsonl", "data_augment": False, "repeat_time": 1, "max_dynamic_patch": 4}
    (folder / "rows.json").write_text(json.dumps({"rows": {**entry, **meta}}))
    return folder / "rows.json"


def pair_row(question="Say.", chosen="yes", rejected="no", **fields):
    return {"question": question, "chosen": chosen, "rejected": rejected, **fields}


def tokenized(row, tokenizer, template="internvl2_5", images=0):
    """Prompt, chosen and rejected, ids and labels each, one context token per image."""
    pair = tokenize_pair(row, partial(tokenize_row, tokenizer=tokenizer, template=template, num_images=images))
    ends = (len(pair.input_ids) - pair.chosen - pair.rejected, len(pair.input_ids) - pair.rejected)
    places = (slice(0, ends[0]), slice(*ends), slice(ends[1], None))
    return [(pair.input_ids[place], pair.labels[place]) for place in places]


def test_every_template_is_tested():
    assert {template for template, _ in PAIRS} == set(TEMPLATES)


@pytest.mark.parametrize(("template", "name"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(question=WORDS, chosen=WORDS, rejected=WORDS)
def test_each_answer_behind_the_prompt_is_its_conversation(template, name, question, chosen, rejected):
    """[prompt | chosen] and [prompt | rejected] are the ids and labels of the plain conversations, with every template.

    Nothing of the prompt is supervised, and it cannot be longer: behind it the answers differ or one is supervised.
    """
    row, tokenizer = pair_row(question, chosen, rejected), TOKENIZERS[name]
    wanted = [encode_row(conversation, tokenizer, template=template) for conversation in _or_none(row)]
    if not wanted or wanted[0][0] == wanted[1][0]:
        with pytest.raises(RowError) as caught:
            tokenized(row, tokenizer, template)
        assert caught.value.reason == "equal_responses"
        return
    prompt, *answers = tokenized(row, tokenizer, template)
    for (ids, labels), (wanted_ids, wanted_labels) in zip(answers, wanted, strict=True):
        assert prompt[0] + ids == wanted_ids
        assert prompt[1] + labels == wanted_labels
    assert set(prompt[1]) == {IGNORE_INDEX}
    (one, one_label), (other, other_label) = ((ids[0], labels[0]) for ids, labels in answers)
    assert one != other or one_label != IGNORE_INDEX or other_label != IGNORE_INDEX


def _or_none(row):
    return () if row["chosen"].strip() == row["rejected"].strip() else conversations_of(row)


def test_answers_that_begin_alike_share_no_answer_token(tokenizer):
    """The prompt is what generation starts from; "It is" stands in both answers, and is supervised in both."""
    row = pair_row("What?", "It is noise", "It is a cat")
    prompt, chosen, rejected = tokenized(row, tokenizer)
    conversation = conversations_of(row)[0]
    assert prompt[0] == encode_prompt(conversation, tokenizer)
    alike = tokenizer("It is", add_special_tokens=False)["input_ids"]
    for ids, labels in (chosen, rejected):
        assert ids[: len(alike)] == labels[: len(alike)] == alike
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert labels[-2] == end, "the end marker is supervised, the newline behind it is not"
        assert labels[-1] == IGNORE_INDEX


def test_a_picture_without_a_place_stands_before_the_question(tokenizer):
    """As the original puts it: `<image>`, a newline, the question."""
    bare = tokenized(pair_row("What?", image="a.png"), tokenizer, images=1)
    assert bare == tokenized(pair_row("<image>\nWhat?", image="a.png"), tokenizer, images=1)
    assert bare != tokenized(pair_row("What?\n<image>", image="a.png"), tokenizer, images=1)


def encoded_rows(data, rng=None):
    """(record, encoded pair, corpus row, corpus) of every row."""
    corpus = data.train_corpus
    for row in range(len(corpus)):
        dataset, record = corpus.locate(row)
        yield record, corpus.encoders[dataset].encode_pair(record, rng), row, corpus


def test_measured_is_encoded(pairs, tokenizer):
    """What a worker produces has the tokens, labels and tiles measured from headers, and is both conversations.

    One picture, several and none: context tokens are all in the prompt, and stand once for both answers.
    """
    data = module(pairs, tokenizer)
    images = set()
    slot = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    for record, pair, row, corpus in encoded_rows(data):
        sides = (pair.chosen_labels, pair.rejected_labels)
        supervised = [len(labels) - labels.count(IGNORE_INDEX) for labels in sides]
        parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        assert sum(map(len, parts)) == corpus.column("tokens")[row]
        assert sum(supervised) == corpus.column("labels")[row]
        assert supervised[0] == corpus.column("chosen_labels")[row]
        tiles = 0 if pair.pixel_values is None else len(pair.pixel_values)
        assert tiles == corpus.column("tiles")[row]
        assert [ids.count(slot) for ids in parts] == [tiles * tiny.TILE_TOKENS, 0, 0]
        paths = record.row.get("image", [])
        count = len(paths) if isinstance(paths, list) else 1
        images.add(count)
        if count > 1:
            continue
        each = (tiles * tiny.TILE_TOKENS,) if count else ()
        sides = zip(conversations_of(record.row), (pair.chosen_ids, pair.rejected_ids), strict=True)
        for conversation, ids in sides:
            assert pair.prompt_ids + ids == encode_row(conversation, tokenizer, num_image_tokens=each)[0]
    assert images == {0, 1, 2}


CONVERSATION = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "."}]}
BAD_ROWS = {
    "no chosen": ({"question": "Say.", "rejected": "no"}, "pair_invalid"),
    "a number as question": (pair_row(question=3), "pair_invalid"),
    "a list as rejected": (pair_row(rejected=["no"]), "pair_invalid"),
    "a conversation": (CONVERSATION, "pair_invalid"),
    "empty chosen": (pair_row(chosen=""), "empty_response"),
    "blank rejected": (pair_row(rejected=" \n"), "empty_response"),
    "the same twice": (pair_row(chosen="no"), "equal_responses"),
    "the same but for blanks": (pair_row(chosen="no\n"), "equal_responses"),
    "no such picture": (pair_row(image="none.png"), "file_missing"),
    "two pictures, no place": (pair_row(image=["0.png", "1.png"]), "placeholder_count"),
    "a place without a picture": (pair_row("<image>\nSay."), "placeholder_count"),
    "a place in an answer": (pair_row(chosen="<image> yes"), "placeholder_count"),
    "a number as picture": (pair_row(image=3), "media_invalid"),
    "a forged slot": (pair_row(rejected="</img>"), "reserved_token"),
    "longer than a pack": (pair_row(rejected="no " * 2000), "over_length"),
    "half a line": ('{"question": "Say.", "cho', "json_invalid"),
}


def test_every_bad_row_is_named_and_counted(tokenizer, tmp_path):
    """Each with its line and reason, none is trained, and the good row of the file is."""
    rows = [row for row, _ in BAD_ROWS.values()]
    data = module(write_rows(tmp_path / "data", [*rows, pair_row()]), tokenizer, reject_limit=1.0)
    found = {line.line: line.reason for line in data.train_corpus.rejects}
    wanted = {number: reason for number, (_, reason) in enumerate(BAD_ROWS.values(), start=1)}
    assert found == wanted
    assert data.ledger.counted == len(BAD_ROWS)
    names = [name for batch in data.train_dataloader() for name in batch.sample_ids]
    assert names == [f"rows {tmp_path}/data/rows.jsonl:{len(BAD_ROWS) + 1}"]


def test_messages_say_what_to_do(tokenizer, tmp_path):
    data = module(
        write_rows(tmp_path / "data", [row for row, _ in BAD_ROWS.values()] + [pair_row()]), tokenizer, reject_limit=1.0
    )
    messages = {line.line: line.message for line in data.train_corpus.rejects}
    places = {name: number for number, name in enumerate(BAD_ROWS, start=1)}
    assert "preference rows have question, chosen, rejected" in messages[places["a conversation"]]
    assert "'chosen' is missing" in messages[places["no chosen"]]
    assert "'question' is of type int" in messages[places["a number as question"]]
    assert "'rejected' is empty" in messages[places["blank rejected"]]


def test_each_conversation_under_one_cap_and_both_answers_under_the_other(tokenizer, tmp_path):
    """Prompt P, answers of C and R tokens: max(P + C, P + R) <= max_sample_tokens and P + C + R <= max_tokens."""
    meta = write_rows(tmp_path / "data", [pair_row(chosen="yes " * 5, rejected="no " * 9), pair_row()])
    _, pair, row, corpus = next(encoded_rows(module(meta, tokenizer)))
    prompt, chosen, rejected = (len(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    assert chosen < rejected
    assert corpus.column("tokens")[row] == prompt + chosen + rejected

    def usable(**caps):
        return len(module(meta, tokenizer, reject_limit=1.0, **caps).train_corpus)

    assert usable(max_tokens=prompt + chosen + rejected) == 2
    assert usable(max_tokens=prompt + chosen + rejected - 1) == 1
    assert usable(max_sample_tokens=prompt + rejected) == 2
    assert usable(max_sample_tokens=prompt + rejected - 1) == 1


@pytest.mark.parametrize(("policy", "over"), [("reject", {"over_length"}), ("shrink", set())])
def test_pictures_over_the_tile_cap(pairs, tokenizer, policy, over):
    """A pack of 2 tiles: pairs with more are rejected, or their pictures get fewer tiles; measured as encoded."""
    data = module(pairs, tokenizer, max_pack_tiles=2, over_length=policy, reject_limit=1.0, packs_per_step=8)
    assert {line.reason for line in data.train_corpus.rejects} == over
    assert (len(data.train_corpus) == 24) == (not over)
    seen = 0
    for _, pair, row, corpus in encoded_rows(data):
        tiles = 0 if pair.pixel_values is None else len(pair.pixel_values)
        assert tiles == corpus.column("tiles")[row] <= 2
        tokens = len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
        assert tokens == corpus.column("tokens")[row]
        seen = max(seen, tiles)
    assert seen == 2


def test_pairs_are_never_cut(pairs, tokenizer):
    """An answer without its end is another answer than the one that was judged."""
    with pytest.raises(ValueError, match=r"over_length=truncate would cut answers.*use reject or shrink"):
        module(pairs, tokenizer, over_length="truncate")


def pixels_of(data, samples, *, seed, epoch=0):
    """Checksum of each sample by its row's id, as a worker makes them."""
    corpus = data.train_corpus
    dataset = PairDataset(corpus, augmentation_seed=seed, reference=None, tile_size=tiny.TILE_SIZE, filler_id=0)
    found = {}
    for sample in samples:
        pack = Pack((sample,), 0, 0)
        batch = dataset[PlannedPack(pack, epoch, 0, 0, 1, 1, 1.0, 0.0)]
        assert not batch.rejects
        found[corpus.locate(sample % len(corpus))[1].digest] = batch.checksums[0]
    return found


def test_pixels_depend_on_the_pair_and_the_augmentation_seed_alone(pairs, tokenizer, tmp_path):
    """Not on the epoch, the use within it, the run's seed, or the place of the row in the file."""
    data = module(pairs, tokenizer)
    rows = range(len(data.train_corpus))
    first = pixels_of(data, rows, seed=0)
    assert len(set(first.values())) == len(first)
    assert pixels_of(data, rows, seed=0, epoch=7) == first
    assert pixels_of(data, [row + 3 * len(rows) for row in rows], seed=0) == first
    for name in ("pictures", "text"):
        path = pairs.parent / f"{name}_pairs.jsonl"
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert pixels_of(module(pairs, tokenizer, seed=5), rows, seed=0) == first
    again = module(pairs, tokenizer)
    other, plain = (pixels_of(again, rows, seed=seed) for seed in (1, None))
    changed = {digest for digest in first if other[digest] != first[digest]}
    assert changed == {digest for digest in first if plain[digest] != first[digest]}
    assert len(changed) == 12, "every picture is degraded, and anew; texts stay"


def test_two_runs_see_the_same_pairs(pairs, tokenizer):
    """Batches of two run seeds and of two augmentation seeds: checksums by name."""

    def checksums(**changes):
        seed = changes.pop("seed", 0)
        batches = module(pairs, tokenizer, seed=seed, **changes).train_dataloader()
        return {name: value for batch in batches for name, value in zip(batch.sample_ids, batch.checksums, strict=True)}

    first = checksums()
    assert len(first) == 24
    assert checksums(seed=9) == first
    other = checksums(augmentation_seed=1)
    assert sorted(name.split()[0] for name in first if other[name] != first[name]) == ["pictures_pairs"] * 12


def test_a_checksum_sees_every_id_and_pixel():
    """Ids moved from one answer to the other, a changed id, a changed pixel: four different numbers."""
    rng = np.random.default_rng(0)
    pair = tiny.random_pair(rng, 5, 3, 4, tiles=1)

    def changed(**fields):
        return checksum(type(pair)(**{name: fields.get(name, getattr(pair, name)) for name in pair.__slots__}))

    pixels = pair.pixel_values.clone()
    pixels[0, 0, 0, 0] ^= 1
    numbers = {
        changed(),
        changed(chosen_ids=[*pair.chosen_ids, pair.rejected_ids[0]], rejected_ids=pair.rejected_ids[1:]),
        changed(prompt_ids=[pair.prompt_ids[0] + 1, *pair.prompt_ids[1:]]),
        changed(pixel_values=pixels),
    }
    assert len(numbers) == 4
    assert changed() == checksum(pair)


def test_packs_hold_whole_pairs_under_the_caps(pairs, tokenizer):
    """Every token of a batch is in one of its pairs, and each response has as many supervised tokens as it says."""
    data = module(pairs, tokenizer)
    seen = []
    for batch in data.train_dataloader():
        seen += batch.sample_ids
        assert batch.input_ids.shape == batch.position_ids.shape
        assert int(batch.cu_seqlens[-1]) == batch.input_ids.shape[1] == int(batch.cu_queries[-1]) <= 1200
        assert int(batch.cu_keys[-1]) == len(batch.key_rows)
        counts = torch.bincount(batch.loss_responses, minlength=2 * batch.num_pairs).view(-1, 2)
        assert torch.equal(counts.float(), batch.response_tokens)
        assert batch.pixel_values.dtype == torch.uint8
        assert len(batch.pixel_values) == sum(batch.sample_tiles) <= 16
        assert torch.isnan(batch.reference_logps).all(), "no reference was opened"
    assert len(seen) == len(set(seen)) == 24
