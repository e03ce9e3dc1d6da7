"""The probe set in a report: answers over time, stage beside stage, and the pictures as the model got them."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ivl_lightning.data.contact_sheet import save_sheet
from ivl_lightning.data.picture_tiles import PictureTiles
from ivl_lightning.data.sample_file import SAMPLES_NAME, SampleCard, SheetPlace, append_cards, read_cards
from ivl_lightning.reporting.probe import MOST_ROWS, probe_table
from ivl_lightning.reporting.report import write_report
from ivl_lightning.reporting.run_folder import StageFolder, read_run
from ivl_lightning.reporting.sheets import embedded


def card(step: int, generated: str, **changes: Any) -> SampleCard:
    values: dict[str, Any] = {"dataset": "color", "file": "val.jsonl", "line": 1, "digest": "d", "metric": "anls"}
    values |= {"question": "What color?", "expected": "red", "truths": ["red", "crimson"], "tiles": 5}
    values |= {"prompt_tokens": 77, "score": float(generated == "red"), **changes}
    return SampleCard(step=step, generated=generated, **values)


def stages(run: Path, **cards: list[SampleCard]) -> list[StageFolder]:
    for name, answered in cards.items():
        (run / name).mkdir(parents=True)
        (run / name / "config.yaml").write_text("{}")
        append_cards(run / name / SAMPLES_NAME, answered)
    return read_run(run).stages


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_step_that_was_answered_again_counts_once(tmp_path: Path) -> None:
    """A run that was killed behind step 4 went on from step 2; it wrote a part of a line in the end."""
    file = tmp_path / SAMPLES_NAME
    append_cards(file, [card(0, "a"), card(2, "b"), card(4, "before"), card(4, "other row", line=2)])
    append_cards(file, [card(4, "after"), card(6, "c")])
    with file.open("a") as stream:
        stream.write('{"step": 8, "dat')
    assert [(one.step, one.generated) for one in read_cards(file)] == [
        (0, "a"),
        (2, "b"),
        (4, "after"),
        (4, "other row"),
        (6, "c"),
    ]
    assert read_cards(tmp_path / "none.jsonl") == []


def test_lines_of_earlier_releases_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_NAME).write_text('{"step": 1, "dataset": "a", "images": [], "generated": "x"}\n')
    assert read_cards(tmp_path / SAMPLES_NAME) == []


# -- answers over time ------------------------------------------------------------------------------------------------


def test_equal_answers_in_a_row_are_one_entry(tmp_path: Path) -> None:
    """blue, blue, red, blue: three spells; the second stage asked another row too."""
    first = [card(step, text) for step, text in ((0, "blue"), (10, "blue"), (20, "red"), (30, "blue"))]
    second = [card(0, "blue"), card(0, "red", line=2), card(5, "red"), card(5, "crim", line=2, score=0.6)]
    table = probe_table(stages(tmp_path, mlp_warmup=first, instruction_tuning=second))
    assert table is not None
    assert table.stages == [
        ("mlp_warmup", "0 of 1 right behind step 30"),
        ("instruction_tuning", "1 of 2 right behind step 5"),
    ]
    told = [[(one.when, one.generated, one.mark) for one in stage.early] for stage in table.rows[0].stages]
    assert told[0] == [("0 to 10", "blue", "wrong"), ("20", "red", "right"), ("30", "blue", "wrong")]
    assert told[1] == [("0", "blue", "wrong"), ("5", "red", "right")]
    other = table.rows[1].stages
    assert other[0].early == []
    assert [one.mark for one in other[1].early] == ["right", "partly"]


def test_many_answers_and_many_rows_stay_readable(tmp_path: Path) -> None:
    """Ten different answers: the first and the last three are shown, and six are counted. 30 rows: 24 are shown."""
    cards = [card(step, f"answer {step}", line=line) for line in range(30) for step in range(10)]
    table = probe_table(stages(tmp_path, mlp_warmup=cards))
    assert table is not None
    assert (len(table.rows), table.total) == (MOST_ROWS, 30)
    shown = table.rows[0].stages[0]
    assert ([one.first for one in shown.early], shown.hidden, [one.first for one in shown.late]) == ([0], 6, [7, 8, 9])
    text = write_report(str(tmp_path)).read_text()
    assert "24 of 30 rows are shown" in text
    assert text.count("6 other answers") == 24


def test_no_answers_no_table(tmp_path: Path) -> None:
    assert probe_table(stages(tmp_path, mlp_warmup=[])) is None


def test_page_marks_answers_by_class_and_by_text(tmp_path: Path) -> None:
    cards = [card(0, ""), card(1, "crims", score=0.57), card(2, "red")]
    stages(tmp_path, mlp_warmup=cards)
    text = write_report(str(tmp_path)).read_text()
    items = re.findall(r'<li class="(\w+)"><span class="when">(.*?)</span>(.*?)</li>', text)
    assert items == [("wrong", "0", "(nothing)"), ("partly", "1 &middot; 0.57", "crims"), ("right", "2", "red")]
    for part in ("red; crimson", "5 tiles, 77 prompt tokens, anls"):
        assert part in text


# -- pictures ---------------------------------------------------------------------------------------------------------


def picture(side: int, cols: int, rows: int, *, thumbnail: bool) -> PictureTiles:
    """Tiles of one gray each, 10 times their number."""
    count = cols * rows + thumbnail
    tiles = torch.arange(count, dtype=torch.uint8).mul(10).view(-1, 1, 1, 1).expand(-1, 3, side, side)
    return PictureTiles("a.png", (99, 50), cols, rows, thumbnail, tiles)


def test_sheet_lays_tiles_out_as_their_grid(tmp_path: Path) -> None:
    """3 x 2 tiles of 32 pixels and 2 between them are 100 x 66; 6 pixels further the thumbnail, halfway down."""
    shown = picture(32, 3, 2, thumbnail=True)
    assert shown.note == "99 x 50 pixels, grid 3 x 2 and thumbnail"
    name = save_sheet(shown, tmp_path, "row")
    assert name == "row.png"
    with Image.open(tmp_path / name) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert pixels.shape == (66, 100 + 6 + 32)
    assert pixels[16::34, 16:100:34].tolist() == [[0, 10, 20], [30, 40, 50]]
    assert pixels[33, 100 + 6 + 16] == 60
    assert pixels[0, 100 + 6 + 16] == 179


@pytest.mark.parametrize(("cols", "rows"), [(1, 1), (4, 3), (12, 1), (1, 12), (6, 6)])
def test_sheets_of_large_tiles_are_small_files(tmp_path: Path, cols: int, rows: int) -> None:
    name = save_sheet(picture(448, cols, rows, thumbnail=cols * rows > 1), tmp_path, "row")
    assert name == "row.jpg"
    assert (tmp_path / name).stat().st_size < 60_000
    with Image.open(tmp_path / name) as sheet:
        assert max(sheet.size) < 900
        assert abs(sheet.convert("L").getpixel((20, 20))) <= 1


def test_small_sheets_are_enlarged_by_whole_numbers(tmp_path: Path) -> None:
    """32 pixels four times; a row of six, 202 pixels wide, once; and a file that is gone says so."""
    for stem, cols, width, enlarged in (("one", 1, 128, True), ("six", 6, 202, False)):
        place = SheetPlace(save_sheet(picture(32, cols, 1, thumbnail=False), tmp_path, stem), "a.png", "note")
        sheet = embedded(place, tmp_path)
        assert (sheet.width, sheet.enlarged) == (width, enlarged)
        assert sheet.source is not None
        kind, _, content = sheet.source.partition(";base64,")
        assert (kind, base64.b64decode(content)) == ("data:image/png", (tmp_path / place.file).read_bytes())
    gone = embedded(SheetPlace("probe/gone.png", "a.png", "note"), tmp_path)
    assert (gone.source, gone.note) == (None, "probe/gone.png is gone")


def test_page_needs_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "mlp_warmup"
    place = SheetPlace(save_sheet(picture(32, 2, 1, thumbnail=True), folder / "probe", "x"), "a.png", "note")
    place = replace(place, file=f"probe/{place.file}")
    asked = card(0, "red", pictures=[place], question="<image>\nWhat?")
    append_cards(folder / SAMPLES_NAME, [asked])
    (folder / "config.yaml").write_text("{}")
    text = write_report(str(tmp_path)).read_text()
    sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', text)
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png")
    assert "url(" not in text
    assert "&lt;image&gt;" not in text, "a single picture stands beside its question"
