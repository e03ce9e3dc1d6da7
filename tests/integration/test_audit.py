"""`ivl-audit`: the files it writes, its exit code, and that each number on them is the run's own."""

import json
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from ivl_lightning.cli.audit import main
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.plan import DEFAULT_COST, spare_frames
from ivl_lightning.data.quality import Hit
from ivl_lightning.data.stream import TrainingStream, plan_settings
from ivl_lightning.reporting.audit import page as audit_page
from ivl_lightning.reporting.audit.files import as_text, write_drop_list
from ivl_lightning.reporting.audit.flagged import flag
from ivl_lightning.reporting.audit.page import MOST_LINES
from ivl_lightning.reporting.audit.statistics import histogram
from ivl_lightning.reporting.audit.token_text import token_spans
from ivl_lightning.reporting.audit.verdict import Tally, verdict
from ivl_lightning.structures import PackedBatch, Record
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
    """Run the command in this process; returns its exit code and folder. Histograms, half of the time, on request."""

    def run(meta: Path | str, *arguments: str, histograms: bool = False) -> tuple[int, Path]:
        folder = tmp_path / "audit"
        if not histograms:
            monkeypatch.setattr(audit_page, "histogram_figure", lambda facts: "data:image/svg+xml;base64,")
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
    code, folder = audit(meta, *SHAPES, histograms=True)
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
    assert numbers["images"] == [{"name": "a.png", "note": "64 x 32 pixels, grid 2 x 1 and thumbnail"}]
    assert {"kind": "slot", "trained": False, "text": "<IMG_CONTEXT> × 12 (3 tiles)"} in numbers["spans"]
    assert [span["text"] for span in numbers["spans"] if span["trained"]][:2] == ["white", "<|im_end|>"]
    assert read(folder)["command"].startswith("ivl-audit")
    assert "torch" in read(folder)["environment"]
    text = page(folder)
    assert "64 x 32 pixels, grid 2 x 1 and thumbnail" in text
    assert "&lt;IMG_CONTEXT&gt; × 12 (3 tiles)" in text
    assert text.count('alt="tile ') == 2
    assert text.count('alt="thumbnail"') == 1
    assert '<span class="trained">white</span><span class="chip special trained">&lt;|im_end|&gt;</span>' in text
    assert '<span class="chip special">&lt;img&gt;</span>' in text


def add_dataset(meta: Path, name: str, rows: list[dict], **entry: object) -> None:
    (meta.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"root": ".", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": 1, **entry}
    meta.write_text(json.dumps({**json.loads(meta.read_text()), name: content}))


def write_gif(path: Path, frames: int = 12) -> None:
    images = [Image.fromarray(np.full((40, 40, 3), 20 * number, np.uint8)) for number in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:])


def work_of(batch: PackedBatch) -> float:
    """The modeled work of a batch: of its tokens, of each document's length squared, of its tiles."""
    lengths = batch.cu_seqlens.diff().double()
    token, attention, tile = DEFAULT_COST
    return float(token * lengths.sum() + attention * lengths.square().sum() + tile * len(batch.pixel_values))


def test_the_forecast_is_what_training_does(audit, meta):
    """Packs, steps, fill and idle share of an epoch with videos and rows held back, against training's own batches."""
    write_gif(meta.parent / "a.gif", frames=4)
    videos = [row(f"a film {number}", "<video>\nWhat?", video="a.gif") for number in range(3)]
    add_dataset(meta, "films", videos, repeat_time=2, max_dynamic_patch=1)
    add_dataset(meta, "seldom", [row("never")], repeat_time=0.5)
    code, folder = audit(meta, *SHAPES, "seed=3", "data.val_rows=5", "data.min_frames=2")
    assert code == 0
    content = read(folder)
    packing = content["packing"]
    config = tiny.tiny_data_config(meta, val_rows=5, min_frames=2)
    data = DynamicPackingDataModule(config, tiny.load_tiny_tokenizer(), seed=3, patch_size=tiny.PATCH_SIZE)
    data.setup("fit")
    assert data.train_corpus is not None
    batches = list(data.train_dataloader())
    full = [batch for batch in batches if batch.sample_ids]
    tokens = sum(batch.input_ids.shape[1] for batch in full)
    tiles = sum(len(batch.pixel_values) for batch in full)
    assert (packing["packs"], packing["tokens"], packing["tiles"]) == (len(full), tokens, tiles)
    assert packing["steps"] == len({batch.planned.step for batch in full})
    samples = Counter(name.split()[0] for batch in full for name in batch.sample_ids)
    held_back = {facts["name"]: facts["held_back"] for facts in content["datasets"]}
    assert sum(held_back.values()) == 5
    assert {facts["name"]: facts["samples"] for facts in content["datasets"]} == {
        "pictures": 12 - held_back["pictures"],
        "text": 12 - held_back["text"],
        "films": 2 * (3 - held_back["films"]),
        "seldom": 0,
    }
    assert {facts["name"]: facts["samples"] for facts in content["datasets"] if facts["samples"]} == samples
    assert packing["fill_tokens"] == pytest.approx(tokens / (256 * len(full)))
    bound = max(-(-tokens // 256), -(-tiles // 16))
    assert packing["lower_bound"] == bound
    assert packing["efficiency"] == pytest.approx(bound / len(full))
    # A rank for each pack of a step: all wait for the dearest.
    steps = [batches[start : start + 4] for start in range(0, len(batches), 4)]
    works = [[work_of(batch) if batch.sample_ids else 0.0 for batch in step] for step in steps]
    busy = [4 * max(work) for work in works]
    assert packing["idle"] == pytest.approx(1 - sum(map(sum, works)) / sum(busy))
    settings = plan_settings(config, seed=3, reduction="square")
    stream = TrainingStream(data.train_corpus, config, settings)
    dealt = [list(stream.packs(rank, 4)) for rank in range(4)]
    for work, time, *planned in zip(works, busy, *dealt, strict=True):
        assert [pack.idle for pack in planned] == pytest.approx([1 - sum(work) / time] * 4)


def test_a_single_pack_a_step_says_nothing_of_idle_ranks(audit, meta):
    _, folder = audit(meta, *SHAPES, "data.packs_per_step=1")
    assert read(folder)["packing"]["idle"] is None
    assert "needs data.packs_per_step" in page(folder)


def test_frames_are_counted_as_the_plan_counts_them():
    """At most 10, at least 8 of draws from 8 to 32: (2 + 1) / 25 frames are left out, where the number is fixed 0."""
    most, fewest = np.asarray([10, 32, 0]), np.asarray([8, 32, 0])
    assert spare_frames(most, fewest, 32).tolist() == pytest.approx([3 / 25, 0, 0])


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
    # However many turns follow, there is one chip for all of them.
    ids = (text * 2000)[:3500] + ([end, *text]) * 200
    spans = token_spans(ids, [-100] * 3500 + ([-100, *text]) * 200, tokenizer, 4)
    assert [span.kind for span in spans] == ["text", "cut"]
    rest = 200 * len(text)
    assert spans[1].text == f"{500 + 200 + rest:,} more tokens, {rest:,} of them trained"


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
    code, folder = audit(meta, *SHAPES, f"drop={drop}", "drop_rules=null")
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
    rows = [{"id": number, "conversations": []} for number in range(MOST_LINES + 5)]
    rows += [row("?", "<image>", image="no.png"), row("fine")]
    code, folder = audit(write_rows(tmp_path, rows), *SHAPES)
    assert code == 1
    assert len(read(folder)["rejected"]) == MOST_LINES + 6
    text = page(folder)
    assert text.count('data-group="conversations_missing"') == MOST_LINES
    assert "501 of 506, at most 500 of each reason" in text
    # A frequent reason hides no rare one.
    assert text.count('data-group="file_missing"') == 1


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
        (["output=/dev/null/x"], "output=/dev/null/x cannot be written (Not a directory)"),
        (["output=/proc"], "output=/proc cannot be written"),
        (["drop=/proc/nothing/x.jsonl"], "drop=/proc/nothing/x.jsonl cannot be written"),
        (["drop=/tmp"], "drop=/tmp cannot be written (it is a folder)"),
        (["data.val_rows=99"], "data.val_rows=99 would hold back all 24 usable rows"),
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


def noise(path: Path, *, cut: bool = False, size: tuple[int, int] = (40, 40)) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    if cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_sample_tells_of_the_rows_that_were_not_opened(audit, tmp_path):
    """Every second picture of 200 is cut off; 30 rows are opened, so the known ones alone are hardly a tenth."""
    noise(tmp_path / "1.png")
    noise(tmp_path / "0.png", cut=True)
    rows = [row(f"answer {number}", "<image>", image=f"{number % 2}.png") for number in range(200)]
    meta = write_rows(tmp_path, rows)
    code, folder = audit(meta, *SHAPES, "rows=30", "data.reject_limit=0.3")
    content = read(folder)
    broken = content["datasets"][0]["broken"]
    assert broken == len(content["rejected"]) < 0.3 * 200
    assert content["verdict"]["estimated"] == round(broken + broken / 30 * 170)
    assert (code, content["verdict"]["state"]) == (1, "over_limit")
    assert "30 of 200 rows of own decoded" in content["verdict"]["sentence"]
    assert f"{broken} are known" in content["verdict"]["sentence"]


def test_verdicts_worked_by_hand():
    """1,000 rows of a with 5 of 100 opened broken: 5 + 5 % of 900 = 50; 1,000 rows of b are whole."""
    whole, half = Tally("b", 1000, 0, usable=1000, opened=1000), Tally("a", 1000, 5, 0, 1000, 100, 5)
    assert half.estimated == 50
    judged = verdict([half, whole], 0.03, 0)
    assert (judged.state, judged.rows, judged.rejected, judged.estimated) == ("ok", 2000, 5, 50)
    assert "100 of 1,000 rows of a decoded" in judged.sentence
    assert "about 50 of 2,000 rows cannot be used (2.5%)" in judged.sentence
    assert verdict([half, whole], 0.02, 1).state == "over_limit"
    assert verdict([whole], 0.0, 0).sentence.endswith("; every usable row decoded")
    # What is uncertain is said, but decides nothing.
    judged = verdict([Tally("a", 10, 0, uncertain=9)], 0.01, 1)
    assert (judged.state, judged.uncertain) == ("warnings", 9)
    many = verdict([Tally(name, 9, 0, usable=9, opened=1) for name in "abcde"], 0.01, 0)
    assert "1 of 9 rows of c, 2 of 18 rows of 2 other datasets decoded" in many.sentence


def test_approximate_tokens_do_not_stop_training(audit, tmp_path):
    """Too long by the stand-in's count is not certain; too many tiles for a pack is, whatever the tokenizer."""
    noise(tmp_path / "a.png", size=(64, 64))
    meta = write_rows(tmp_path, [row("猫狗鱼" * 200, f"{number}?") for number in range(4)])
    shapes = [argument for argument in SHAPES if not argument.startswith("model.tokenizer")]
    code, folder = audit(meta, *shapes)
    content = read(folder)
    assert code == 0
    assert "4 more are over_length by approximate tokens" in content["verdict"]["sentence"]
    assert "give model.tokenizer" in content["verdict"]["sentence"]
    assert warned(content)["approximate_tokens"]["rows"] == 4
    assert all(line["message"].startswith("not certain: approximate tokens") for line in content["rejected"])
    code, folder = audit(meta, *SHAPES)
    assert (code, "approximate_tokens" in warned(read(folder))) == (1, False)
    meta = write_rows(tmp_path, [row("cat", "<image>", image="a.png")])
    assert audit(meta, *shapes, "data.max_pack_tiles=4")[0] == 1


def test_warnings_count_the_rows_that_are_rejected(audit, tmp_path):
    """Pictures that all pass a cap, and films whose files are missing, are what the warnings are for."""
    noise(tmp_path / "a.png", size=(128, 128))
    rows = [row(f"text {number}", f"{number}?") for number in range(3)] + [row("cat", "<image>", image="a.png")]
    meta = write_rows(tmp_path, rows, max_dynamic_patch=20)
    code, folder = audit(meta, *SHAPES)
    found = warned(read(folder))["tiles_over_pack"]
    assert (code, found["rows"], found["example"]) == (1, 1, "line 4")
    code, folder = audit(meta, *SHAPES, "data.over_length=shrink")
    found = warned(read(folder))["tiles_over_pack"]
    assert (code, found["rows"], found["example"]) == (0, 1, "line 4")
    assert "shrunk" in found["message"]
    films = [row("v", "<video>\nWhat?", video="missing.mp4") for _ in range(3)]
    _, folder = audit(write_rows(tmp_path, [*films, row("t")]), *SHAPES)
    content = read(folder)
    assert warned(content)["video_augmented"]["rows"] == 3
    assert content["datasets"][0]["kinds"] == {"video": 3, "text": 1}
    # The limit of the tiles is the run's, and is called so.
    assert "data.max_tiles is 4 and the dataset has no max_dynamic_patch" in warned(content)["video_tiles"]["message"]


def test_pictures_beside_a_film_lack_augmentation_too(audit, tmp_path):
    noise(tmp_path / "a.png")
    write_gif(tmp_path / "a.gif")
    rows = [row(f"a{number}", "<image>", image="a.png") for number in range(3)]
    meta = write_rows(tmp_path, [*rows, row("v", "<video>\nWhat?", video="a.gif")], data_augment=False)
    _, folder = audit(meta, *SHAPES)
    found = warned(read(folder))["not_augmented"]
    assert found["rows"] == 3
    assert "videos in a dataset of their own" in found["advice"]


def test_pictures_behind_urls_are_looked_at_as_far_as_they_are_opened(audit, tmp_path):
    """Two of five rows are opened; the other three are counted as not looked at."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    fsspec.filesystem("memory").pipe("/audit/a.jpg", (tmp_path / "a.jpg").read_bytes())
    rows = [row(f"a{number}", "<image>", image="a.jpg") for number in range(5)]
    meta = write_rows(tmp_path, rows, root="memory://audit")
    code, folder = audit(meta, *SHAPES, "data.allowed_schemes=[memory]", "rows=2")
    assert code == 0
    content = read(folder)
    found = warned(content)["exif_rotated"]
    assert found["rows"] == 2
    assert "3 pictures behind URLs were not looked at" in found["message"]
    assert content["datasets"][0]["unchecked"] == 3
    assert "own: 3 pictures lie behind URLs" in page(folder)


def test_validation_data_are_measured(audit, meta, tmp_path):
    """Rejects of val_meta count as they do in training, and are marked on the page."""
    (tmp_path / "val").mkdir()
    val_meta = write_rows(tmp_path / "val", [row("fine"), row("x", "<image>", image="no.png")])
    code, folder = audit(meta, *SHAPES, f"data.val_meta={val_meta}")
    content = read(folder)
    assert code == 1
    assert (content["verdict"]["rows"], content["verdict"]["rejected"]) == (26, 1)
    (facts,) = content["validation"]["datasets"]
    assert facts == {"name": "own", "rows": 2, "used": 1, "rejected": {"file_missing": 1}}
    assert [line["line"] for line in content["validation"]["rejects"]] == [2]
    assert 'own<br><span class="soft">validation</span>' in page(folder)


def test_a_second_round_keeps_the_first(audit, tmp_path):
    """The list that the audit left out is the list that it writes: its lines stay in front of the new ones."""
    meta = write_rows(tmp_path, [row("0" * 40), row("word " * 15), row("fine"), row("fine")])
    drop = tmp_path / "drop.jsonl"
    assert audit(meta, *SHAPES, f"drop={drop}", "drop_rules=[zeros]")[0] == 0
    first = drop.read_text()
    assert audit(meta, *SHAPES, f"drop={drop}", f"data.exclude={drop}")[0] == 0
    assert drop.read_text().startswith(first)
    assert [json.loads(line)["line"] for line in drop.read_text().splitlines()] == [1, 2, 4]
    code, folder = audit(meta, *SHAPES, f"drop={tmp_path}/other.jsonl", f"data.exclude={drop}")
    assert code == 0
    assert (tmp_path / "other.jsonl").read_text() == drop.read_text()
    assert read(folder)["counts"]["own"]["used"] == 1


def test_a_list_without_a_last_line_break_is_kept_whole(tmp_path):
    (tmp_path / "old.jsonl").write_text("a")
    write_drop_list(tmp_path / "old.jsonl", "b\n", tmp_path / "old.jsonl")
    assert (tmp_path / "old.jsonl").read_text() == "a\nb\n"


def test_the_log_of_a_mistake_is_named_and_does_not_outlive_it(audit, meta, capsys):
    code, folder = audit(meta, *SHAPES, "data.exclude=/not/there")
    assert code == 2
    assert f"(details: {folder}/error.log)" in capsys.readouterr().err
    assert (folder / "error.log").is_file()
    assert audit(meta, *SHAPES)[0] == 0
    assert not (folder / "error.log").exists()


def test_what_cannot_be_written_in_the_end_is_a_message(audit, meta, tmp_path, capsys):
    """A folder stands in the place of the page."""
    (tmp_path / "audit" / "audit.html").mkdir(parents=True)
    code, folder = audit(meta, *SHAPES)
    assert code == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(file.name for file in folder.iterdir()) == ["audit.html", "audit.json"]


def test_findings_are_written_one_by_one():
    """4,000 findings become megabytes of JSON, of which next to nothing is held."""
    record = Record("own", "own.jsonl", 1, {"id": "row"}, 0, "0" * 16)
    flagged = [flag(record, Hit("zeros", "x" * 200, 40.0, 32.0)) for _ in range(4_000)]
    tracemalloc.start()
    size = sum(map(len, as_text({"hits": flagged})))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 1_000_000
    assert peak < 100_000
