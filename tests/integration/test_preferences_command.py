"""`ivl-preferences`: both methods, the files it writes, and that an interrupted command loses and changes nothing."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_module

from ivl_lightning.cli.preferences import read_config
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.config.schema import DataConfig, ModelConfig
from ivl_lightning.curation.build import build_pairs
from ivl_lightning.curation.sampling import seeded
from ivl_lightning.data.annotations import read_meta
from ivl_lightning.data.corpus import read_corpus
from ivl_lightning.data.encoding import encoder_factory
from ivl_lightning.data.ledger import TooManyRejectsError
from ivl_lightning.data.pair_encoding import PairEncoder
from ivl_lightning.inference.decoding import decode_inside
from ivl_lightning.models.tokenizer import load_tokenizer, text_ids
from tests import tiny
from tests.commands import ROOT, environment

FOLLOWS = {"\n": "ZB", "Z": " !", "B": " !", " ": "ZB"}
"""What may follow a token, each as likely as the other; "!" is the end marker."""


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A model that says Z and B, between blanks, at random ("Z", "B Z", ...); half of its answers are a word."""
    model = tiny.build_tiny_model(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = {text: end if text == "!" else tokenizer(text)["input_ids"][0] for text in "\nZB !"}
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.language_model.norm.weight.fill_(1.0)
        embeddings.zero_()
        head.zero_()
        for dimension, (text, followers) in enumerate(FOLLOWS.items()):
            embeddings[ids[text], dimension] = 1.0
            head[[ids[one] for one in followers], dimension] = 4.0
    return model


def write_data(folder: Path) -> Path:
    """Pictures and text; two rows that are left out on purpose, and one whose picture breaks when it is decoded."""
    meta = tiny.write_tiny_data(folder, rows=8, max_dynamic_patch=2)
    pictures = read(folder / "pictures.jsonl")
    for number, row in enumerate(pictures):
        row["conversations"][-1]["value"] = ["Z", "B", "nothing"][number % 3]
    pictures[1]["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Z"}]
    pictures[2]["conversations"] = [{"from": "system", "value": "Be kind."}, *pictures[2]["conversations"]]
    picture = folder / "3.png"
    picture.write_bytes(picture.read_bytes()[:-400])
    write(folder / "pictures.jsonl", pictures)
    return meta


def write(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def build(speaker, tokenizer, data):
    def run(output: Path, **settings: object):
        own = {
            "model": tiny.tiny_config(),
            "data": tiny.tiny_data_config(data),
            "prompt": "plain",
            "samples": 6,
            "max_new_tokens": 8,
            "batch_size": 3,
            "samples_per_batch": 4,
            "device": "cpu",
            "progress_bar": False,
        }
        return build_pairs(PreferencesConfig(output=str(output), **{**own, **settings}), speaker, tokenizer)

    return run


def content(folder: Path) -> dict[str, bytes]:
    """What a command has written, by name."""
    files = [*folder.glob("*.json*"), *folder.glob("responses/*")]
    return {file.name + str(file.parent == folder): file.read_bytes() for file in files}


def test_right_answers_meet_wrong_ones(build, data, tmp_path):
    summary = build(tmp_path / "out")
    counts = summary.datasets["pictures"]
    assert (counts.questions, counts.responses) == (5, 30)
    assert counts.rejected == {"multi_turn": 1, "system_turn": 1, "image_truncated": 1}
    assert counts.right + counts.wrong == counts.responses
    assert counts.right > 0
    assert counts.all_wrong >= 2  # "nothing" is never said
    rows = read(tmp_path / "out/pictures.jsonl")
    assert len(rows) == counts.pairs > 0
    assert len({row["id"] for row in rows}) == len(rows)
    sources = {row["id"]: row for row in read(data.parent / "pictures.jsonl")}
    for row in rows:
        source = sources[row["id"].rpartition("-")[0]]
        assert row["image"] == source["image"]
        assert row["question"] == source["conversations"][0]["value"]
        assert row["chosen"] == row["answer_gt"] == source["conversations"][1]["value"]
        assert row["chosen"] not in row["rejected"]
        assert row["rejected_meta"]["score"] == 0.0
        assert row["chosen_meta"] == {"answer": row["chosen"], "score": 1.0}
        assert row["source"]["file"] == str(data.parent / "pictures.jsonl")
    wrong = read(tmp_path / "out/all_wrong.jsonl")
    assert len(wrong) == sum(one.all_wrong for one in summary.datasets.values())
    assert {row["answer_gt"] for row in wrong} >= {"nothing", "0", "1"}
    left_out = read(tmp_path / "out/rejected.jsonl")
    assert [line["line"] for line in left_out] == [2, 3, 4]
    assert [line["counted"] for line in left_out] == [False, False, True]


def test_meta_is_official_and_every_pair_can_be_trained_on(build, data, tmp_path, tokenizer):
    summary = build(tmp_path / "out")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta == {
        "pictures": {
            "root": str(data.parent),
            "annotation": "pictures.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "max_dynamic_patch": 2,
            "length": summary.pairs,
        }
    }
    (spec,) = read_meta(summary.meta)
    assert spec.annotation == str(tmp_path / "out/pictures.jsonl")
    factory = encoder_factory(
        tiny.tiny_data_config(data),
        tokenizer,
        template="internvl2_5",
        tile_tokens=tiny.TILE_TOKENS,
        training=True,
        encoder=PairEncoder,
    )
    assert len(read_corpus(summary.meta, factory, cache_dir=None, progress=False)) == summary.pairs
    # Numbers are expected there, and none is ever said.
    assert read(tmp_path / "out/text.jsonl") == []
    assert json.loads((tmp_path / "out/summary.json").read_text())["pairs"] == summary.pairs


@pytest.mark.parametrize("method", ["correctness", "dropout_ntp"])
@pytest.mark.parametrize("kept", ["nothing", "half a line", "half a batch", "a hole"])
def test_an_interrupted_command_goes_on_to_the_same_end(build, tmp_path, method, kept, caplog):
    build(tmp_path / "out", method=method)
    whole = content(tmp_path / "out")
    responses = tmp_path / "out/responses/pictures.jsonl"
    lines = responses.read_bytes().splitlines(keepends=True)
    left = {
        "nothing": b"",
        "half a line": b"".join(lines[:4]) + lines[4][:40],
        "half a batch": b"".join(lines[:5]),
        "a hole": b"".join(lines[:3]) + b"\0" * 80 + b"\n" + lines[4],
    }
    responses.write_bytes(left[kept])
    (tmp_path / "out/responses/text.jsonl").unlink(missing_ok=True)
    (tmp_path / "out/meta.json").unlink()
    build(tmp_path / "out", method=method)
    assert content(tmp_path / "out") == whole
    assert ("not finished" in caplog.text) == (kept != "nothing")


def test_random_numbers_of_a_batch_are_its_own_and_leave_the_others_alone():
    def drawn(*batch):
        with seeded(*batch, torch.device("cpu")):
            return torch.rand(1).item()

    torch.manual_seed(5)
    undisturbed = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    draws = {drawn(0, "pictures", 0), drawn(0, "pictures", 1), drawn(0, "text", 0), drawn(1, "pictures", 0)}
    assert len(draws) == 4
    assert drawn(0, "pictures", 0) in draws
    assert torch.equal(torch.cat([first, torch.rand(1)]), undisturbed)


@pytest.mark.parametrize("name", ["internlm2_vit300m", "phi3_sp", "qwen2_bytebpe", "qwen2_vit300m"])
@pytest.mark.parametrize("text", ["the red car", "是的。红色的车 是", "a\n\nb c , d ."])
def test_a_text_is_continued_with_its_blanks(name, text):
    tokenizer = load_tokenizer(tiny.TOKENIZER.with_name(name))
    ids = text_ids(tokenizer, text)[0]
    starts = {place: tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False) for place in range(1, len(ids))}
    # Where a character is cut in the middle there is no text to continue.
    whole = {place: start for place, start in starts.items() if "\ufffd" not in start}
    assert whole
    assert {start + decode_inside(tokenizer, ids[place:]) for place, start in whole.items()} == {text}


def test_other_judges_and_pairs_take_the_same_responses(build, tmp_path):
    first = build(tmp_path / "out")
    path = tmp_path / "out/responses/pictures.jsonl"
    made = path.stat().st_mtime_ns
    second = build(tmp_path / "out", max_pairs=1, judges={"pictures": "anls"})
    assert path.stat().st_mtime_ns == made
    assert 0 < second.pairs < first.pairs
    assert second.datasets["pictures"].skipped["over_max_pairs"] > 0


def test_other_settings_of_sampling_are_refused(build, tmp_path, speaker):
    build(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"begun with temperature=1\.0, this command says 0\.5"):
        build(tmp_path / "out", temperature=0.5, seed=1)
    with pytest.raises(ConfigError, match=r"begun with prompt='plain', this command says 'cot_en'"):
        build(tmp_path / "out", prompt="cot_en")
    with pytest.raises(ConfigError, match=r"begun with method='correctness'"):
        build(tmp_path / "out", method="dropout_ntp")
    weight = speaker.lm_head.weight.data
    weight[0, 0] += 1
    try:
        with pytest.raises(ConfigError, match=r"begun with weights='[0-9a-f]{16}', this command says"):
            build(tmp_path / "out")
    finally:
        weight[0, 0] -= 1


def test_answers_are_finished_without_the_image(build, data, tmp_path):
    summary = build(tmp_path / "out", method="dropout_ntp", max_new_tokens=12)
    counts = summary.datasets["pictures"]
    assert counts.rejected == {"multi_turn": 1, "system_turn": 1, "image_truncated": 1}
    assert summary.datasets["text"].rejected == {"no_image": 8}
    assert counts.pairs + sum(counts.skipped.values()) == counts.questions == 5
    rows = read(tmp_path / "out/pictures.jsonl")
    assert len(rows) == counts.pairs > 0
    for row in rows:
        kept = len(row["chosen"].split()) // 2
        assert kept > 0
        assert row["rejected"].split()[:kept] == row["chosen"].split()[:kept]
        assert row["rejected"] != row["chosen"]
        assert "<image>" in row["question"]
        assert row["chosen_meta"]["score"] is None
    assert (tmp_path / "out/all_wrong.jsonl").read_text() == ""


def test_answers_of_the_data_are_finished_without_the_image(build, data, tmp_path):
    """Texts of one word have no first half; those of several do."""
    rows = read(data.parent / "pictures.jsonl")
    own = tmp_path / "data"
    own.mkdir()
    rows[0]["conversations"][-1]["value"] = "Z B Z B Z B"
    write(own / "pictures.jsonl", [rows[0], rows[4]])
    entry = {"root": str(data.parent), "annotation": "pictures.jsonl", "data_augment": True, "repeat_time": 2}
    (own / "meta.json").write_text(json.dumps({"pictures": entry}))
    summary = build(
        tmp_path / "out",
        method="dropout_ntp",
        answers="data",
        max_new_tokens=2,
        seed=1,
        data=tiny.tiny_data_config(own / "meta.json"),
    )
    counts = summary.datasets["pictures"]
    assert counts.skipped == {"empty_half": 1}
    (row,) = read(tmp_path / "out/pictures.jsonl")
    assert row["chosen"] == "Z B Z B Z B"
    assert row["image"] == ["0.png", "0.png"]
    assert row["rejected"] in {"Z B Z Z", "Z B Z B", "Z B Z"}
    assert counts.responses == 3


def test_mistakes_are_named(build, data, tmp_path):
    with pytest.raises(ConfigError, match=r"temperature=0\.0 must be above 0.*\ntop_p=2\.0 is a share"):
        build(tmp_path / "out", temperature=0.0, top_p=2.0)
    with pytest.raises(
        ConfigError, match=r"judges names the datasets \['picture'\], but .* has \['pictures', 'text'\]"
    ):
        build(tmp_path / "out", judges={"picture": "anls"})
    with pytest.raises(ConfigError, match=r"data\.tile_size=64, but the vision tower takes 32"):
        build(tmp_path / "out", data=tiny.tiny_data_config(data, tile_size=64))
    (data.parent / "broken.jsonl").write_text("{\n" + (data.parent / "text.jsonl").read_text())
    entry = {"root": ".", "annotation": "broken.jsonl", "data_augment": False, "repeat_time": 1}
    meta = data.parent / "broken.json"
    meta.write_text(json.dumps({"text": entry}))
    with pytest.raises(TooManyRejectsError, match=r"1 of 9 rows cannot be used .* json_invalid"):
        build(tmp_path / "out", data=tiny.tiny_data_config(meta))


def test_two_processes_do_not_write_to_one_folder(build, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out/.lock", is_singleton=False),
        pytest.raises(ConfigError, match=r"out is being written by another process"),
    ):
        build(tmp_path / "out")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ivl_lightning.cli.preferences", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_command(speaker, tokenizer, data, tmp_path):
    speaker.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [
        f"model.path={tmp_path}/model",
        f"data.meta={data}",
        f"data.tile_size={tiny.TILE_SIZE}",
        "data.max_tokens=420",
        "data.max_pack_tiles=16",
        f"output={tmp_path}/out",
        "prompt=plain",
        "samples=6",
        "max_new_tokens=8",
        "device=cpu",
    ]
    result = command(*arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"pairs: {tmp_path}/out/meta.json" in result.stdout
    assert "1 multi_turn" in result.stdout
    assert read(tmp_path / "out/pictures.jsonl")
    refused = command(*arguments, "seed=3")
    assert refused.returncode == 2
    assert "was begun with seed=0, this command says 3" in refused.stderr


def test_the_defaults_are_those_of_the_dataclass():
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        composed = compose("preferences", overrides=["output=x", "model.path=y", "data.meta=z", "data.cache_dir=null"])
    config = read_config(composed)
    assert config == PreferencesConfig(output="x", model=ModelConfig(path="y"), data=DataConfig(meta="z"))
    assert config.prompt_style == "cot_en"


def test_misspelt_and_missing_settings():
    result = command("sample=3", "model.path=x", "data.meta=x", "output=x")
    assert result.returncode == 2
    assert "sample is not a setting. Did you mean samples?" in result.stderr
    result = command("data.meta=x")
    assert result.returncode == 2
    assert "not given: output" in result.stderr


def test_help_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['--help']; from ivl_lightning.cli.preferences import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert "ivl-preferences model.path=FOLDER" in result.stdout
    assert result.stdout.strip().endswith("False")
