"""`ivl-audit`: the files it writes, its exit code, and that each number on them is the run's own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivl_lightning.cli.audit import main
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.reporting.audit.page import MOST_LINES
from ivl_lightning.reporting.audit.statistics import histogram
from ivl_lightning.reporting.audit.token_text import token_spans
from tests import tiny
from tests.commands import ROOT, environment

FAULTS = ROOT / "tests/fixtures/faults"
SHAPES = [
    f"model.tokenizer={tiny.TOKENIZER}",
    f"+model.vision.image_size={tiny.TILE_SIZE}",
    f"+model.vision.patch_size={tiny.PATCH_SIZE}",
    f"data.tile_size={tiny.TILE_SIZE}",
    "data.max_tokens=256",
    "data.max_pack_tiles=16",
    "data.packs_per_step=4",
    "data.max_tiles=4",
    "data.index_workers=1",
]


@pytest.fixture
def audit(monkeypatch, tmp_path):
    """Run the command in this process; returns its exit code and folder."""

    def run(meta: Path | str, *arguments: str) -> tuple[int, Path]:
        folder = tmp_path / "audit"
        monkeypatch.setattr(sys, "argv", ["ivl-audit", f"data.meta={meta}", f"output={folder}", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, folder

    return run


def read(folder: Path) -> dict:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def page(folder: Path) -> str:
    return (folder / "audit.html").read_text(encoding="utf-8")


def write_rows(folder: Path, rows: list[dict], **entry: object) -> Path:
    """A dataset `own` of these rows; returns meta.json."""
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"root": ".", "annotation": "own.jsonl", "data_augment": True, "repeat_time": 1, **entry}
    (folder / "meta.json").write_text(json.dumps({"own": content}))
    return folder / "meta.json"


def row(answer: str, question: str = "Say it.", **media: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**media, "conversations": turns}


def warned(content: dict) -> dict[str, dict]:
    return {warning["rule"]: warning for warning in content["warnings"]}


def test_the_command_finds_every_fault_and_leaves_nothing_but_its_files(tmp_path):
    """The contract: two arguments, no tokenizer; every bad row with line and reason, exit code 1, both files whole."""
    command = [sys.executable, "-m", "ivl_lightning.cli.audit", f"data.meta={FAULTS}/meta.json", "output=out"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1, result.stderr
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["audit.html", "audit.json", "out"]
    content = read(tmp_path / "out")
    expected = json.loads((FAULTS / "expected.json").read_text())["rows"]
    found = {(line["dataset"], line["line"]): line for line in content["rejected"]}
    for line in expected:
        reject = found.pop((line["dataset"], line["line"]), None)
        if line["must"]:
            assert (reject is not None) == (line["expected"] == "reject"), line
        if reject is not None:
            assert reject["reason"] in (line["reason"], *line.get("also", [])), line
            assert reject["id"] == line.get("id"), line
            assert reject["message"]
    assert not found
    assert content["counts"]["files"] == {"rows": 8, "used": 3, "rejected": 5}
    assert content["verdict"]["state"] == "over_limit"
    assert not content["geometry"]["exact"]
    text = page(tmp_path / "out")
    assert "rejects over limit" in text
    assert "Token counts are approximate" in text
    assert all(f">{line['reason']}" in text for line in content["rejected"])


def test_clean_data_pass(audit, meta):
    code, folder = audit(meta, *SHAPES)
    assert code == 0
    content = read(folder)
    assert content["rejected"] == []
    assert content["counts"] == {name: {"rows": 12, "used": 12, "rejected": 0} for name in ("pictures", "text")}
    assert content["geometry"]["tokens_per_tile"] == tiny.TILE_TOKENS
    # Pictures without augmentation are worth a warning, text is not.
    assert [(warning["rule"], warning["dataset"]) for warning in content["warnings"]] == [("not_augmented", "pictures")]
    assert sum(facts["shares"]["tokens"] for facts in content["datasets"]) == pytest.approx(1)
    text = page(folder)
    assert "Token counts are approximate" not in text
    # Nothing is fetched: every picture is in the page, and nothing refers to another file.
    assert set(re.findall(r'src="([a-z]+:[a-z]+/)', text)) == {"data:image/"}
    assert not re.search(r'(?:href|src)="(?!#|data:)', text)


def test_rows_are_shown_as_the_model_sees_them(audit, tmp_path):
    """64 x 32 pixels are 2 x 1 tiles and a thumbnail: 3 x 4 context tokens, and the answer with its end is trained."""
    half = np.zeros((32, 64, 3), dtype=np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(tmp_path / "a.png")
    meta = write_rows(tmp_path, [row("white", "<image>\nRight?", image="a.png")], data_augment=False)
    code, folder = audit(meta, *SHAPES)
    assert code == 0
    (numbers,) = read(folder)["examples"]["own"]
    assert (numbers["line"], numbers["tiles"]) == (1, 3)
    text = page(folder)
    assert "64 x 32 pixels, grid 2 x 1 and thumbnail" in text
    assert "&lt;IMG_CONTEXT&gt; × 12 (3 tiles)" in text
    assert text.count('alt="tile ') == 2
    assert text.count('alt="thumbnail"') == 1
    assert '<span class="trained">white</span><span class="chip special trained">&lt;|im_end|&gt;</span>' in text
    assert '<span class="chip special">&lt;img&gt;</span>' in text


def test_the_forecast_is_what_training_does(audit, meta):
    """Packs, steps, fill and idle share of an epoch, against the batches that training gets."""
    _, folder = audit(meta, *SHAPES, "seed=3")
    packing = read(folder)["packing"]
    tokenizer = tiny.load_tiny_tokenizer()
    data = DynamicPackingDataModule(tiny.tiny_data_config(meta), tokenizer, seed=3, patch_size=tiny.PATCH_SIZE)
    data.setup("fit")
    batches = [batch for batch in data.train_dataloader() if batch.sample_ids]
    tokens = sum(batch.input_ids.shape[1] for batch in batches)
    tiles = sum(len(batch.pixel_values) for batch in batches)
    assert (packing["packs"], packing["tokens"], packing["tiles"]) == (len(batches), tokens, tiles)
    assert packing["steps"] == len({batch.planned.step for batch in batches})
    assert packing["samples"] == sum(len(batch.sample_ids) for batch in batches) == 24
    assert packing["fill_tokens"] == pytest.approx(tokens / (256 * len(batches)))
    bound = max(-(-tokens // 256), -(-tiles // 16))
    assert packing["lower_bound"] == bound
    assert packing["efficiency"] == pytest.approx(bound / len(batches))
    assert 0 <= packing["idle"] < 1


def test_the_text_of_a_row_cannot_become_part_of_the_page(audit, tmp_path):
    evil = '</span></div><script>alert(1)</script><img src=x onerror="alert(2)">'
    image = 'a"><script>alert(3)</script>.png'
    rows = [
        {"id": evil, **row(evil, f"{evil}?")},
        # Flagged by a quality rule, and rejected with the path in its message.
        row(f"{evil}\n" * 9),
        row("x", "<image>", image=image),
        row("x", evil, image=["<script>"]),
    ]
    code, folder = audit(write_rows(tmp_path, rows), *SHAPES)
    assert code == 1
    text = page(folder)
    assert text.count("<script") == 1, "the page's own"
    assert "onerror=&#34;" in text
    assert "<img src=x" not in text
    assert 'a"><' not in text


def test_what_breaks_when_opened_is_rejected_and_counts(audit, tmp_path):
    """One of 3 pictures is cut off behind its header: only opening it tells, and only opened rows are known."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in "abc":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    rows = [row(name, "<image>", image=f"{name}.png") for name in "abc"]
    meta = write_rows(tmp_path, rows)
    code, folder = audit(meta, *SHAPES, "rows=null")
    assert code == 1
    assert [(line["line"], line["reason"]) for line in read(folder)["rejected"]] == [(2, "image_truncated")]
    assert audit(meta, *SHAPES, "rows=null", "data.reject_limit=0.5")[0] == 0
    assert audit(meta, *SHAPES, "rows=0")[0] == 0
    assert read(folder)["datasets"][0]["opened"] == 0


def test_histograms_worked_by_hand():
    """Few whole numbers get a bin each, centered on it; many get 30 of one width; a far outlier makes widths grow."""
    few = histogram(np.asarray([1, 1, 3]))
    assert (few.edges, few.counts, few.log) == ([0.5, 1.5, 2.5, 3.5], [2, 0, 1], False)
    many = histogram(np.arange(301))
    assert (many.edges[1], len(many.counts), sum(many.counts), many.log) == (10.0, 30, 301, False)
    far = histogram(np.asarray([2, 3, 4, 20_000]))
    assert (far.log, sum(far.counts), far.counts[-1]) == (True, 4, 1)
    assert far.edges[1] / far.edges[0] == pytest.approx(far.edges[9] / far.edges[8])


def test_tokens_are_shown_by_kind():
    """Two trained words among special tokens; a character of several tokens stays whole; a label 0 is never trained."""
    tokenizer = tiny.load_tiny_tokenizer()
    text = tokenizer("猫 cat")["input_ids"]
    end, slot = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<IMG_CONTEXT>"])
    ids = [*text, *[slot] * 8, *text, end]
    labels = [text[0], *[-100] * (len(text) + 7), *text, end]
    spans = [(span.kind, span.trained, span.text) for span in token_spans(ids, labels, tokenizer, 4)]
    assert spans == [
        ("text", False, "猫 cat"),
        ("slot", False, "<IMG_CONTEXT> × 8 (2 tiles)"),
        ("text", True, "猫 cat"),
        ("special", True, "<|im_end|>"),
    ]
    long = token_spans(text * 2000, [-100] * len(text) * 2000, tokenizer, 4)
    assert [span.kind for span in long] == ["text", "cut"]
    assert long[1].text == f"{len(text) * 2000 - 3000:,} more tokens"


def test_a_picture_that_was_shrunk_is_shown_in_its_smaller_grid(audit, tmp_path):
    """128 x 32 pixels would be 4 x 1 tiles and a thumbnail; 4 tiles a pack leave 3 x 1 and a thumbnail."""
    Image.fromarray(np.zeros((32, 128, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    meta = write_rows(tmp_path, [row("black", "<image>", image="a.png")])
    _, folder = audit(meta, *SHAPES, "data.max_pack_tiles=4", "data.over_length=shrink")
    assert "grid 3 x 1 and thumbnail" in page(folder)
    code, folder = audit(meta, *SHAPES, "data.max_pack_tiles=4")
    assert code == 1
    content = read(folder)
    assert content["rejected"][0]["reason"] == "over_length"
    assert content["packing"] is None
    assert warned(content)["no_samples"]["rows"] == 0


def test_warnings_about_pictures_and_settings(audit, tmp_path):
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.full((40, 40), 9000, dtype=np.uint16)).save(tmp_path / "gray.png")
    Image.fromarray(pixels[:20, :20]).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((30, 400, 3), dtype=np.uint8)).save(tmp_path / "long.png")
    names = ["turned.jpg", "gray.png", "small.png", "long.png"]
    rows = [row("a cat", "<image>", image=name) for name in names] + [row("a cat", f"{n}?") for n in range(16)]
    meta = write_rows(tmp_path, rows, data_augment=False, max_dynamic_patch=20)
    code, folder = audit(meta, *SHAPES)
    assert code == 0
    found = warned(read(folder))
    assert found["exif_rotated"]["example"] == "line 1"
    assert "data.exif_transpose=true" in found["exif_rotated"]["advice"]
    assert found["gray16"]["example"] == "line 2"
    assert found["small_picture"]["example"] == "line 3"
    assert found["extreme_aspect"]["example"] == "line 4"
    assert found["not_augmented"]["rows"] == 4
    # 20 tiles and a thumbnail, where a pack holds 16.
    assert "21 tiles" in found["tiles_over_pack"]["message"]
    assert found["same_answers"]["rows"] == 20
    assert "a cat" in found["same_answers"]["example"]
    switched = [*SHAPES, "data.exif_transpose=true", "data.gray16=scale", "data.max_pack_tiles=32"]
    audit(meta, *switched)
    assert not {"exif_rotated", "gray16", "tiles_over_pack"} & set(warned(read(folder)))


def test_a_dataset_that_fills_or_misses_the_epoch_is_named(audit, tmp_path):
    write_rows(tmp_path, [row("word " * 30, f"{number}?") for number in range(30)])
    content = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "few.jsonl").write_text(json.dumps(row("yes")) + "\n")
    few = {**content["own"], "annotation": "few.jsonl"}
    (tmp_path / "meta.json").write_text(json.dumps({**content, "few": few, "none": {**few, "repeat_time": 0.5}}))
    _, folder = audit(tmp_path / "meta.json", *SHAPES)
    found = warned(read(folder))
    assert found["dominant"]["dataset"] == "own"
    assert found["no_samples"]["dataset"] == "none"


def test_the_exclusion_list_makes_a_round_trip(audit, tmp_path):
    """What quality rules flag, of duplicates all but the first, is left out by data.exclude and flagged no more."""
    answers = ["fine", "0" * 40, "fine", "word " * 15, "fine", "good"]
    meta = write_rows(tmp_path, [{"id": number, **row(answer)} for number, answer in enumerate(answers)])
    drop = tmp_path / "drop.jsonl"
    code, folder = audit(meta, *SHAPES, f"drop={drop}")
    assert code == 0
    entries = [json.loads(line) for line in drop.read_text().splitlines()]
    assert [(entry["line"], entry["rule"]) for entry in entries] == [
        (2, "zeros"),
        (3, "duplicate"),
        (4, "repeated_ngrams"),
        (5, "duplicate"),
    ]
    assert all(set(entry) == {"dataset", "line", "id", "digest", "rule", "message"} for entry in entries)
    assert all(re.fullmatch("[0-9a-f]{16}", entry["digest"]) for entry in entries)
    flagged = read(folder)["quality"]["hits"]
    assert {line["line"] for line in flagged} == {2, 3, 4, 5}
    assert "own, line 1" in next(line["message"] for line in flagged if line["line"] == 5)
    code, folder = audit(meta, *SHAPES, f"data.exclude={drop}")
    content = read(folder)
    # Set aside on purpose, so not over the limit.
    assert code == 0
    assert [(line["line"], line["reason"], line["counted"]) for line in content["rejected"]] == [
        (line, "excluded", False) for line in (2, 3, 4, 5)
    ]
    assert content["quality"]["hits"] == []
    assert content["counts"]["own"]["used"] == 2


def test_an_exclusion_list_is_not_overwritten(audit, tmp_path, capsys):
    meta = write_rows(tmp_path, [row("0" * 40), row("word " * 15), row("fine")])
    drop = tmp_path / "drop.jsonl"
    code, folder = audit(meta, *SHAPES, f"drop={drop}", "drop_rules=[zeros]")
    assert [json.loads(line)["line"] for line in drop.read_text().splitlines()] == [1]
    assert audit(meta, *SHAPES, f"drop={drop}", "drop_rules=[zeros]")[0] == code == 0
    (folder / "audit.json").unlink()
    assert audit(meta, *SHAPES, f"drop={drop}")[0] == 2
    assert "look at it" in capsys.readouterr().err
    assert len(drop.read_text().splitlines()) == 1
    # The hours of the audit itself are not lost.
    assert (folder / "audit.json").is_file()


def test_a_page_of_many_rejects_shows_the_first(audit, tmp_path):
    rows = [{"id": number, "conversations": []} for number in range(MOST_LINES + 5)] + [row("fine")]
    code, folder = audit(write_rows(tmp_path, rows), *SHAPES)
    assert code == 1
    assert len(read(folder)["rejected"]) == MOST_LINES + 5
    text = page(folder)
    assert text.count('data-group="conversations_missing"') == MOST_LINES
    assert "The first 2,000 of 2,005" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.meta=/not/there.json"], "/not/there.json: cannot be read"),
        (["outputs=x"], "outputs is not a setting. Did you mean output?"),
        (["data.max_token=5"], "data.max_token is not a setting. Did you mean max_tokens?"),
        (["rows=many"], "rows='many'"),
        (["examples=-1"], "examples=-1 must be at least 0"),
        (["drop_rules=[nonsense]"], "drop_rules.0='nonsense'"),
        (["model.tokenizer=/not/there"], "/not/there is not a folder"),
        (["data.weights={pictures:1}"], "data.weights must name each dataset"),
        (["data.tile_size=64"], "data.tile_size=64, but the vision tower takes 32"),
        (["output=/dev/null/x"], "output=/dev/null/x cannot be made"),
        (["rows=["], "rows=[ cannot be read"),
        (["model=nonsense"], "nonsense"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(audit, meta, capsys, arguments, message):
    assert audit(meta, *SHAPES, *arguments)[0] == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_recipe_brings_its_packing_and_geometry(audit, meta):
    code, folder = audit(meta, "recipe=internvl2_5_8b", f"model.tokenizer={tiny.TOKENIZER}")
    assert code == 0
    content = read(folder)
    assert content["packing"]["packs_per_step"] == 512
    assert content["data"]["over_length"] == "truncate"
    assert content["geometry"]["tokens_per_tile"] == 256


def test_a_model_folder_brings_tokenizer_and_geometry(audit, meta, tmp_path):
    tokenizer = tiny.load_tiny_tokenizer()
    tiny.build_tiny_model(tokenizer).config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code, folder = audit(meta, f"model.path={tmp_path}/model", f"data.tile_size={tiny.TILE_SIZE}")
    assert code == 0
    geometry = read(folder)["geometry"]
    assert (geometry["exact"], geometry["tokens_per_tile"]) == (True, tiny.TILE_TOKENS)


def test_help_loads_no_torch():
    code = "import sys; sys.argv = ['ivl-audit', '--help']; from ivl_lightning.cli.audit import main\n"
    code += "import atexit; atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\nmain()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "TORCH False" in result.stdout
    assert "ivl-audit data.meta=FILE output=FOLDER" in result.stdout
