import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from ivl_lightning.constants import SPECIAL_TOKENS
from ivl_lightning.data.annotations import read_meta
from ivl_lightning.data.conversation import encode_row
from ivl_lightning.data.templates import get_template
from ivl_lightning.data.tiling import cut_tiles
from ivl_lightning.miniature import dataset as dataset_module
from ivl_lightning.miniature.dataset import write_dataset
from ivl_lightning.miniature.pictures import Picture
from ivl_lightning.miniature.prepare import prepare
from ivl_lightning.miniature.tasks import KINDS, Kind
from ivl_lightning.models.tokenizer import image_token_id, load_tokenizer

TILE_SIZE = 64
TOKENS_PER_TILE = 16
SETTINGS = {"rows": 24, "val_rows": 8, "seed": 3}
SPLITS = ("train", "val", "language_train", "language_val")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("miniature")
    prepare(path, **SETTINGS)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder / "tokenizer")


def read_rows(folder: Path, split: str, kind: str) -> list[dict]:
    return [json.loads(line) for line in (folder / split / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]


def image_files(folder: Path, split: str, kind: str, row: dict) -> list[Path]:
    image = row.get("image", [])
    return [folder / split / kind / name for name in ([image] if isinstance(image, str) else image)]


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_and_another_seed_other_rows(folder, tmp_path):
    prepare(tmp_path / "same", **SETTINGS)
    assert all_files(tmp_path / "same") == all_files(folder)
    prepare(tmp_path / "other", **{**SETTINGS, "seed": 4})
    assert read_rows(tmp_path / "other", "train", "color") != read_rows(folder, "train", "color")


@pytest.mark.parametrize("kind", KINDS)
def test_validation_contents_are_never_trained(folder, kind):
    contents = {}
    for split in ("train", "val"):
        rows = read_rows(folder, split, kind)
        files = [file for row in rows for file in image_files(folder, split, kind, row)]
        texts = [row["conversations"][0]["value"].encode() for row in rows]
        contents[split] = {file.read_bytes() for file in files} if files else set(texts)
    assert contents["val"]
    assert contents["train"].isdisjoint(contents["val"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_encodes_with_the_real_tile_counts(folder, tokenizer, split, kind):
    rows = read_rows(folder, split, kind)
    assert len(rows) == (SETTINGS["rows"] if split.endswith("train") else SETTINGS["val_rows"])
    for row in rows:
        images = [Image.open(file) for file in image_files(folder, split, kind, row)]
        tiles = [len(cut_tiles(image, max_tiles=4, tile_size=TILE_SIZE)) for image in images]
        ids, labels = encode_row(row, tokenizer, num_image_tokens=[TOKENS_PER_TILE * count for count in tiles])
        assert ids.count(image_token_id(tokenizer)) == TOKENS_PER_TILE * sum(tiles)
        answer = tokenizer.decode([label for label in labels if label >= 0])
        assert answer == row["conversations"][1]["value"] + "<|im_end|>"


def test_palette_has_every_form_of_input(folder):
    forms = Counter()
    for kind in KINDS:
        row = read_rows(folder, "train", kind)[0]
        forms[type(row.get("image"))] += 1
    assert forms[str] >= 2
    assert forms[list] >= 1
    assert forms[type(None)] >= 1
    wide = KINDS["row"].draw(Random(0), TILE_SIZE).images[0]
    assert len(cut_tiles(wide, max_tiles=4, tile_size=TILE_SIZE)) == 4


@pytest.mark.parametrize("name", KINDS)
def test_floor_is_the_share_of_the_most_common_answer(name):
    kind, draws = KINDS[name], 1000
    rng = Random(0)
    counts = Counter(kind.draw(rng, TILE_SIZE).answer for _ in range(draws))
    share = counts.most_common(1)[0][1] / draws
    assert kind.floor < 0.6
    # Four standard deviations of a share, and the luck of being the most common of several.
    assert share == pytest.approx(kind.floor, abs=0.05)


def test_metas_list_every_kind_relative_to_themselves(folder):
    for prefix, augmented in (("", True), ("language_", False)):
        train = read_meta(folder / f"{prefix}meta.json")
        assert [spec.name for spec in train] == list(KINDS)
        assert {spec.data_augment for spec in train} == {augmented}
        assert {spec.name: spec.repeat_time for spec in train} == {n: kind.repeat_time for n, kind in KINDS.items()}
        val = read_meta(folder / f"{prefix}val_meta.json")
        assert {spec.repeat_time for spec in val} == {1}
        assert all(Path(spec.annotation).is_file() for spec in train + val)


def test_complete_dataset_is_left_alone_and_a_broken_one_made_again(folder, tmp_path, monkeypatch):
    prepare(tmp_path, **SETTINGS)
    before = all_files(tmp_path)
    monkeypatch.setattr(dataset_module, "_write_kind", None)
    prepare(tmp_path, **SETTINGS)
    monkeypatch.undo()
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "train" / "color.jsonl").write_text("half a ro", encoding="utf-8")
    (tmp_path / "tokenizer" / "trained_on.json").unlink()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    prepare(tmp_path, **SETTINGS)
    assert all_files(tmp_path) == before


def test_killed_between_two_kinds_leaves_no_description(tmp_path):
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, **SETTINGS, advance=stop)
    assert not (tmp_path / "dataset.json").exists()
    write_dataset(tmp_path, **SETTINGS)
    assert (tmp_path / "dataset.json").is_file()


def test_kind_without_enough_examples_is_named(tmp_path, monkeypatch):
    narrow = Kind(lambda rng, tile_size: KINDS["spell"].draw(Random(0), tile_size), floor=0.0, repeat_time=1)
    monkeypatch.setattr(dataset_module, "KINDS", {"narrow": narrow})
    with pytest.raises(ValueError, match="'narrow' has too few different examples"):
        write_dataset(tmp_path, **SETTINGS)


def test_sketch_tells_a_word_for_each_context_token():
    picture = Picture(2, TILE_SIZE, Random(0))
    picture.add_shape("square", "red", (64, 0, 128, 64), smallest=0.9, largest=0.9)
    words = picture.sketch().split()
    assert len(words) == 3 * TOKENS_PER_TILE
    assert set(words[:16]) == {"."}
    assert words[16:20] == ["red", "square", "red", "square"]
    assert words[32:36] == [".", ".", "red", "square"]


@pytest.mark.parametrize(
    "text", ["What color is the shape?", "这是什么颜色？ 红色", "smörgåsbord 🙂\n\ttab", "x=12345"]
)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_splits_digits_and_knows_the_markers(tokenizer):
    assert tokenizer.tokenize("4096") == ["4", "0", "9", "6"]
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", *SPECIAL_TOKENS):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert 400 <= len(tokenizer) <= 652


def test_system_text_and_answers_cost_few_tokens(tokenizer):
    assert len(tokenizer(get_template("internvl2_5").system_text)["input_ids"]) <= 10
    assert len(tokenizer("What color is the shape?")["input_ids"]) == 6
