"""Meta files that explain themselves, rows by byte offset, media by the official order."""

from __future__ import annotations

import json
import math
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_lightning.data import json_spans
from ivl_lightning.data.annotations import AnnotationFile, MetaError, media_of, read_meta
from ivl_lightning.data.json_spans import row_spans
from ivl_lightning.structures import RowError

FAULTS = Path(__file__).parents[1] / "fixtures" / "faults"
EXPECTED = json.loads((FAULTS / "expected.json").read_text())
GOOD = {"root": "data", "annotation": "rows.jsonl", "data_augment": True, "repeat_time": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


def write_meta(folder: Path, text: str) -> Path:
    path = folder / "meta.json"
    path.write_text(text)
    return path


def refused(folder: Path, text: str) -> MetaError:
    with pytest.raises(MetaError) as caught:
        read_meta(write_meta(folder, text))
    assert str(folder / "meta.json") in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", EXPECTED["metas"])
def test_recorded_meta_faults(name: str) -> None:
    expected = EXPECTED["metas"][name]
    if expected["expected"] == "accept":
        assert [spec.name for spec in read_meta(FAULTS / name)] == ["d"]
        return
    with pytest.raises(
        MetaError, match=f"dataset 'd' has no key '{name[len('meta_missing_') : -len('.json')]}'"
    ) as caught:
        read_meta(FAULTS / name)
    assert caught.value.reason == expected["reason"]


def test_meta_paths_are_relative_to_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the meta file, not to the working directory; absolute ones and URLs stay."""
    absolute = GOOD | {"root": "s3://bucket/x", "annotation": str(folder / "rows.jsonl"), "max_dynamic_patch": 6}
    path = write_meta(folder, json.dumps({"a": GOOD, "b": absolute | {"length": 9, "metric": "anls"}}))
    monkeypatch.chdir("/")
    first, second = read_meta(path)
    assert (first.root, first.annotation) == (str(folder / "data"), str(folder / "rows.jsonl"))
    assert (second.root, second.annotation) == ("s3://bucket/x", str(folder / "rows.jsonl"))
    assert (first.data_augment, first.repeat_time, first.max_dynamic_patch) == (True, 2, None)
    assert second.max_dynamic_patch == 6
    assert (first.metric, second.metric) == (None, "anls")


@pytest.mark.parametrize(
    ("change", "reason", "named"),
    [
        ({"repeat_times": 1}, "meta_key_unknown", "did you mean 'repeat_time'?"),
        ({"zzz": 1}, "meta_key_unknown", "remove it"),
        ({"data_augment": "true"}, "meta_value", "expected true or false"),
        ({"root": None}, "meta_value", "'root' is null"),
        ({"repeat_time": True}, "meta_value", "'repeat_time' is true"),
        ({"repeat_time": 0}, "meta_value", "remove its entry"),
        ({"repeat_time": float("nan")}, "meta_value", "above 0"),
        ({"max_dynamic_patch": 0}, "meta_value", "at least 1"),
        ({"max_dynamic_patch": 1.5}, "meta_value", "'max_dynamic_patch' is 1.5"),
        ({"metric": "accuracy"}, "meta_value", "'metric' is \"accuracy\", expected one of exact_match, "),
        ({"metric": ["anls"]}, "meta_value", "'metric' is [\"anls\"]"),
        ({"annotation": "none.jsonl"}, "annotation_missing", "none.jsonl is not a file"),
        ({"annotation": ""}, "annotation_missing", "''"),
        ({"annotation": "s3://b/x.jsonl"}, "meta_value", "local disk"),
    ],
)
def test_meta_faults_name_dataset_key_and_remedy(folder: Path, change: dict[str, Any], reason: str, named: str) -> None:
    error = refused(folder, json.dumps({"good": GOOD, "caption": GOOD | change}))
    assert error.reason == reason
    assert named in str(error)
    assert "'caption'" in str(error)


@pytest.mark.parametrize("text", ["{}", "[]", "3", "", '{"a": ', '{"a": 1}', "[" * 100_000])
def test_meta_that_holds_no_datasets(folder: Path, text: str) -> None:
    assert refused(folder, text).reason in ("meta_invalid", "meta_value")


def test_meta_missing() -> None:
    with pytest.raises(MetaError, match=r"check data\.meta") as caught:
        read_meta("/nowhere/meta.json")
    assert caught.value.reason == "meta_missing"
    assert pickle.loads(pickle.dumps(caught.value)).reason == "meta_missing"


def test_duplicate_datasets_are_not_merged_silently(folder: Path) -> None:
    """JSON readers keep the last of two equal names; half of the data would vanish unseen."""
    entry = json.dumps(GOOD)
    error = refused(folder, f'{{"twin": {entry}, "twin": {entry}}}')
    assert error.reason == "meta_duplicate"
    assert "'twin'" in str(error)


def spans_of(data: bytes) -> list[tuple[int, bytes]]:
    return [(span.line, data[span.offset : span.offset + span.length]) for span in row_spans(BytesIO(data))]


def test_lines_with_blanks_bom_and_carriage_returns() -> None:
    """Line numbers count every line; spans leave out line ends; the last line needs none."""
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n  \t\n{broken\n{"b": 2}'
    assert spans_of(data) == [(1, b'{"a": 1}'), (4, b"{broken"), (5, b'{"b": 2}')]


def test_list_file() -> None:
    """Elements of any kind are rows; brackets, commas, quotes and escapes within strings are text."""
    text = '[\n {"a": "]},{\\"\\\\"},\n\n 7, {"b": [1, {"c": 2}]}\n, {bad}, "x"]\n'
    expected = [(2, b'{"a": "]},{\\"\\\\"}'), (4, b"7"), (4, b'{"b": [1, {"c": 2}]}\n'), (5, b"{bad}"), (5, b'"x"')]
    assert spans_of(text.encode()) == expected


@pytest.mark.parametrize("data", [b"", b" \n\n", b"[]", b" [ ]\n", b"\xef\xbb\xbf"])
def test_files_without_rows(data: bytes) -> None:
    assert spans_of(data) == []


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b'[{"a": 1}', [(1, b'{"a": 1}'), (1, b"")]),
        (b'[{"a": 1},\n{"b', [(1, b'{"a": 1}'), (2, b'{"b'), (2, b"")]),
        (b'[{"a": 1}]\n\n{"b": 2}', [(1, b'{"a": 1}'), (3, b"")]),
        (b'[{"a": 1}}, {"b": 2}]', [(1, b'{"a": 1}}'), (1, b'{"b": 2}')]),
    ],
)
def test_lists_that_do_not_end_well(data: bytes, rows: list[tuple[int, bytes]]) -> None:
    """What is whole is kept; an empty last row brings the damage into the ledger."""
    assert spans_of(data) == rows


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=5)


@given(ROWS, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_list_rows_equal_the_json_library(rows: list[Any], indent: int | None, ascii_only: bool, chunk: int) -> None:
    """Every row is found and parsed as a JSON reader of the whole file would, wherever chunks are cut."""
    data = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_spans, "_CHUNK_BYTES", chunk)
        spans = list(row_spans(BytesIO(data)))
    assert [json.loads(data[s.offset : s.offset + s.length]) for s in spans] == rows
    assert [s.line for s in spans] == [data[: s.offset].count(b"\n") + 1 for s in spans]


@given(ROWS)
def test_lines_equal_the_json_library(rows: list[Any]) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    assert [json.loads(raw) for _, raw in spans_of(data)] == rows


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_end(data: bytes, as_list: bool) -> None:
    """No input hangs the scan or yields bytes outside of the file, in rising order."""
    data = b"[" + data if as_list else data
    spans = list(row_spans(BytesIO(data)))
    ends = [0, *(span.offset + span.length for span in spans)]
    assert all(end <= span.offset for end, span in zip(ends, spans, strict=False))
    assert ends[-1] <= len(data)


def test_recorded_rows_survive_their_neighbors() -> None:
    """The broken line is refused with its place; every other line of the file is parsed."""
    file = AnnotationFile(FAULTS / "rows.jsonl")
    reasons = {}
    for line, offset, length in file.iter_lines():
        try:
            file.parse(file.read(offset, length))
        except RowError as error:
            reasons[line] = error.reason
    expected = [row for row in EXPECTED["rows"] if row["dataset"] == "rows" and row["reason"] == "json_invalid"]
    assert reasons == {row["line"]: "json_invalid" for row in expected}


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_rows_that_are_no_objects(raw: bytes) -> None:
    with pytest.raises(RowError) as caught:
        AnnotationFile.parse(raw)
    assert caught.value.reason == "json_invalid"


def test_unicode_rows() -> None:
    assert AnnotationFile.parse('{"a": "\\ud83d\\ude00 é 你"}'.encode()) == {"a": "\U0001f600 é 你"}


def test_changed_file_is_noticed(folder: Path) -> None:
    with pytest.raises(RowError, match="build the index again") as caught:
        AnnotationFile(folder / "rows.jsonl").read(0, 50)
    assert caught.value.reason == "row_lost"


def test_the_clip_of_a_video() -> None:
    assert media_of({"video": "v", "clip": [1, 2.5]}).clip == (1.0, 2.5)
    endless = [0, math.inf], [0, math.nan], [math.nan, 1], [0, 10**400]
    for clip in ([2, 1], [1], "1-2", [None, 3], [-1, 2], [False, True], [0, 1, "2"], *endless):
        with pytest.raises(RowError, match="'clip' is"):
            media_of({"video": "v", "clip": clip})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": "a.jpg"}, ("image", ("a.jpg",), None)),
        ({"image": ["a.jpg"]}, ("images", ("a.jpg",), None)),
        ({"image": ["a", "b"], "video": "v"}, ("images", ("a", "b"), None)),
        ({"image": "", "video": "v.mp4"}, ("video", (), "v.mp4")),
        ({"image": [], "video": "v.mp4"}, ("video", (), "v.mp4")),
        ({"image": None, "video": None}, ("text", (), None)),
        ({"video": ""}, ("text", (), None)),
        ({}, ("text", (), None)),
    ],
)
def test_media_order(row: dict[str, object], expected: tuple[object, ...]) -> None:
    expected = (*expected, None)
    """A non-empty image, list or text, comes before a non-empty video; neither is text."""
    assert media_of(row) == expected


@pytest.mark.parametrize(
    "row", [{"image": 3}, {"image": {}}, {"image": ["a", None]}, {"image": [""]}, {"image": False}, {"video": ["v"]}]
)
def test_media_of_other_types(row: dict[str, object]) -> None:
    with pytest.raises(RowError) as caught:
        media_of(row)
    assert caught.value.reason == "media_invalid"
