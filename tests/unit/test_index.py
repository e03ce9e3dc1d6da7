"""The index: exact, parallel, resumable, cached by content, and never half there."""

import json
import multiprocessing
import resource
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data import index
from ivl_lightning.data.annotations import AnnotationFile, read_meta
from ivl_lightning.data.corpus import read_corpus
from ivl_lightning.data.encoding import encoder_factory
from ivl_lightning.data.exclusion import check_exclusions, read_exclusions
from ivl_lightning.data.index import DatasetIndex, build_indexes
from ivl_lightning.data.index_file import IndexParts, IndexWriteError, read_index, write_index
from ivl_lightning.data.locations import MediaError
from ivl_lightning.data.measuring import COLUMNS, concatenate, digest_text, measure_rows, row_digest
from ivl_lightning.data.media import MediaReader
from ivl_lightning.structures import Reject
from tests import tiny

ROWS = 3000


def write_text_data(folder: Path, rows: int = ROWS) -> Path:
    """Rows of text, every 500th broken; long enough to be measured by several processes."""
    with (folder / "text.jsonl").open("w") as file:
        for number in range(rows):
            words = " ".join(str(number * step) for step in range(12))
            turns = [{"from": "human", "value": f"Say {words}"}, {"from": "gpt", "value": words[: number % 40 + 1]}]
            line = json.dumps({"id": number, "conversations": turns})
            file.write((line[:-1] if number % 500 == 499 else line) + "\n")
    meta = {"text": {"root": ".", "annotation": "text.jsonl", "data_augment": False, "repeat_time": 1}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def make_factory(**changes):
    config = DataConfig(meta="", max_tokens=512, tile_size=tiny.TILE_SIZE, **changes)
    tokenizer = tiny.load_tiny_tokenizer()
    return encoder_factory(config, tokenizer, template="internvl2_5", tile_tokens=tiny.TILE_TOKENS, training=True)


def make_encoder(meta: Path, **changes):
    return make_factory(**changes)(read_meta(meta)[0])


def assert_equal(one, two):
    assert one.rejects == two.rejects
    for name in COLUMNS:
        assert np.array_equal(one.columns[name], two.columns[name]), name


def build_index(encoder, **options) -> DatasetIndex:
    return build_indexes([encoder], **options)[0]


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    return write_text_data(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def alone(meta):
    return build_index(make_encoder(meta), workers=1, progress=False)


def test_several_processes_measure_what_one_does(meta, alone):
    assert len(alone) == ROWS - ROWS // 500
    assert [line.line for line in alone.rejects] == [500, 1000, 1500, 2000, 2500, 3000]
    assert {line.reason for line in alone.rejects} == {"json_invalid"}
    assert_equal(build_index(make_encoder(meta), workers=2, progress=False), alone)


def test_a_row_is_found_again_by_its_place(meta, alone):
    file = AnnotationFile(meta.parent / "text.jsonl")
    for row in (0, 1234, len(alone) - 1):
        raw = file.read(int(alone.columns["offset"][row]), int(alone.columns["length"][row]))
        assert row_digest(raw) == int(alone.columns["digest"][row])
        assert AnnotationFile.parse(raw)["id"] == int(alone.columns["line"][row]) - 1


def start(target, *arguments) -> multiprocessing.Process:
    """A process of its own, forked so that it need not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def measure_in_small_parts(meta: Path, cache: Path, workers: int) -> None:
    index._PART_ROWS = 300
    build_index(make_encoder(meta), cache_dir=cache, workers=workers, progress=False)


def test_a_killed_index_goes_on_where_it_stopped(meta, alone, tmp_path):
    """kill -9 once some parts are written: the next process measures only the rest, and the index is the same."""
    process = start(measure_in_small_parts, meta, tmp_path, 2)
    while len(list(tmp_path.glob("*.parts/*.parquet"))) < 3:
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.parquet"))
    (folder,) = tmp_path.glob("*.parts")
    kept = IndexParts(folder)
    assert 0 < kept.num_rows < ROWS
    rest = sum(stretch.num_rows for stretch in measure_rows(make_encoder(meta), start=kept.end, workers=1))
    assert kept.num_rows + rest == ROWS
    assert_equal(build_index(make_encoder(meta), cache_dir=tmp_path, workers=1, progress=False), alone)
    assert not list(tmp_path.glob("*.parts"))


def test_two_processes_at_once_make_one_index(meta, alone, tmp_path):
    processes = [start(measure_in_small_parts, meta, tmp_path, 1) for _ in range(2)]
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert_equal(build_index(make_encoder(meta), cache_dir=tmp_path, progress=False), alone)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_cache_is_noticed_and_made_again(meta, alone, tmp_path, damage, caplog):
    build_index(make_encoder(meta), cache_dir=tmp_path, workers=1, progress=False)
    (path,) = tmp_path.glob("*.parquet")
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no index" * 100}[damage])
    assert_equal(build_index(make_encoder(meta), cache_dir=tmp_path, workers=1, progress=False), alone)
    assert "not a whole index" in caplog.text
    assert path.stat().st_size == len(whole)


def test_a_damaged_part_is_measured_again(meta, alone, tmp_path):
    encoder = make_encoder(meta)
    stretches = list(measure_rows(encoder, workers=1))
    build_index(encoder, cache_dir=tmp_path, workers=1, progress=False)
    (path,) = tmp_path.glob("*.parquet")
    path.unlink()
    parts = IndexParts(path.with_suffix(".parts"))
    parts.add(stretches[:2])
    parts.add(stretches[2:4])
    (path.with_suffix(".parts") / "000001.parquet").write_bytes(b"half")
    assert IndexParts(path.with_suffix(".parts")).num_rows == sum(one.num_rows for one in stretches[:2])
    assert_equal(build_index(encoder, cache_dir=tmp_path, workers=1, progress=False), alone)


def measure_on_a_small_disk(meta: Path, cache: Path, answer: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        build_index(make_encoder(meta), cache_dir=cache, workers=1, progress=False)
    except ValueError as error:
        answer.send(str(error))


def test_a_full_disk_is_said_so(meta, tmp_path):
    """A process that may write 4 kB to a file stands for a disk with as much room."""
    ours, theirs = multiprocessing.Pipe()
    start(measure_on_a_small_disk, meta, tmp_path, theirs).join(timeout=120)
    assert ours.poll()
    message = ours.recv()
    assert "cannot write" in message
    assert "give data.cache_dir another folder" in message
    assert not list(tmp_path.glob("*.parquet"))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_is_a_file_is_said_so(meta, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(IndexWriteError, match=r"data.cache_dir=.*cannot be used"):
        build_index(make_encoder(meta), cache_dir=tmp_path / "cache", workers=1, progress=False)


def test_what_decides_the_counts_decides_the_cache(meta, tmp_path):
    for changes in ({}, {"max_tiles": 6}, {"image_labels": "auto"}, {"max_frames": 16}):
        build_index(make_encoder(meta, **changes), cache_dir=tmp_path, workers=1, progress=False)
    assert len(list(tmp_path.glob("*.parquet"))) == 4
    build_index(make_encoder(meta, resize="fast"), cache_dir=tmp_path, workers=1, progress=False)
    assert len(list(tmp_path.glob("*.parquet"))) == 4, "how pixels are made changes no count"


def test_an_exclusion_list_is_honored_by_content(meta, alone, tmp_path):
    """Lines 3 and 5 are listed; line 5 was mended since, so its digest differs and it stays."""
    path = tmp_path / "drop.jsonl"
    digests = [digest_text(int(alone.columns["digest"][row])) for row in (2, 4)]
    entries = [
        {"dataset": "text", "line": 3, "id": "2", "digest": digests[0], "rule": "repeated_lines", "message": "x"},
        {"dataset": "text", "line": 5, "id": "4", "digest": digests[1][::-1], "rule": "zeros", "message": "x"},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    corpus = read_corpus(str(meta), make_factory(), cache_dir=None, progress=False, exclude=str(path))
    assert len(corpus) == len(alone) - 1
    listed = [line for line in corpus.rejects if line.reason == "excluded"]
    assert [(line.line, line.id, line.counted) for line in listed] == [(3, "2", False)]
    assert listed[0].file.endswith("text.jsonl")


def test_what_a_list_does_not_hit_is_said(meta, alone, tmp_path, caplog):
    """A line that matches no row is counted in the log; a dataset that is not there is an error."""
    path = tmp_path / "drop.jsonl"
    options = {"cache_dir": None, "progress": False, "exclude": str(path)}
    path.write_text('{"dataset": "text", "digest": "0123456789abcdef", "id": "a\u2028b"}\n\n')
    corpus = read_corpus(str(meta), make_factory(), **options)
    assert len(corpus) == len(alone)
    check_exclusions(str(path), corpus.indexes)
    assert "1 of 1 lines" in caplog.text
    path.write_text('{"dataset": "txt", "digest": "0123456789abcdef"}\n')
    with pytest.raises(ValueError, match=r"names the datasets \['txt'\], but meta.json has \['text'\]"):
        check_exclusions(str(path), corpus.indexes)


@pytest.mark.parametrize(("listed", "kept"), [(1, [1, 2]), (2, [1]), (3, []), (4, [])])
def test_of_equal_rows_the_first_are_kept(tmp_path, listed, kept):
    """Three byte-equal rows: a list with k of them takes away the last k."""
    tiny.write_tiny_data(tmp_path)
    row = (tmp_path / "text.jsonl").read_text().splitlines()[0]
    (tmp_path / "text.jsonl").write_text(f"{row}\n" * 3)
    entry = {"dataset": "text", "line": 1, "digest": digest_text(row_digest(row.encode())), "rule": "duplicate"}
    (tmp_path / "drop.jsonl").write_text((json.dumps(entry) + "\n") * listed)
    exclude = str(tmp_path / "drop.jsonl")
    corpus = read_corpus(
        str(tmp_path / "meta.json"), make_factory(), cache_dir=None, progress=False, exclude=exclude
    ).view(["text"])
    assert corpus.column("line").tolist() == kept
    assert sorted(line.line for line in corpus.rejects) == [line for line in (1, 2, 3) if line not in kept]


def test_a_wrong_exclusion_list_is_named(tmp_path):
    path = tmp_path / "drop.jsonl"
    path.write_text('{"dataset": "a", "digest": "00"}\n{"dataset": "a"}\n')
    with pytest.raises(ValueError, match=r"drop.jsonl:2 is no line of an exclusion list"):
        read_exclusions(str(path))
    with pytest.raises(ValueError, match=r"data.exclude=.* cannot be read"):
        read_exclusions(str(tmp_path / "none"))


def test_many_datasets_under_one_roof(tmp_path):
    """Each index is its own dataset's; a JSON list and a JSONL file of the same rows cost the same."""
    tiny.write_tiny_data(tmp_path)
    content = json.loads((tmp_path / "meta.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "pictures.jsonl").read_text().splitlines()]
    (tmp_path / "pictures.json").write_text(json.dumps(rows, indent=1))
    content["list"] = {**content["pictures"], "annotation": "pictures.json"}
    (tmp_path / "meta.json").write_text(json.dumps(content))
    factory = make_factory()
    encoders = [factory(spec) for spec in read_meta(tmp_path / "meta.json")]
    pictures, text, listed = build_indexes(encoders, progress=False)
    assert len(text) == 12
    for name in ("tokens", "labels", "tiles"):
        assert np.array_equal(pictures.columns[name], listed.columns[name])


def test_media_that_came_late_are_found(tmp_path):
    """A picture missing at first is rejected; once it is there the cached index takes its row in, in file order."""
    meta = tiny.write_tiny_data(tmp_path / "data")
    picture = tmp_path / "data/2.png"
    content = picture.read_bytes()
    picture.unlink()
    encoder = make_encoder(meta)
    first = build_index(encoder, cache_dir=tmp_path, progress=False)
    assert [(line.line, line.reason) for line in first.rejects] == [(3, "file_missing")]
    picture.write_bytes(content)
    assert build_index(encoder, cache_dir=tmp_path, progress=False).rejects == first.rejects, "no one asked"
    (late,) = build_indexes([encoder], cache_dir=tmp_path, progress=False, look_again=True)
    assert_equal(late, build_index(encoder, progress=False))
    assert_equal(late, build_index(encoder, cache_dir=tmp_path, progress=False))


def test_late_media_of_a_one_line_list(tmp_path):
    """All rows stand on line 1; only the one whose picture came late is measured again."""
    meta = tiny.write_tiny_data(tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data/pictures.jsonl").read_text().splitlines()]
    (tmp_path / "data/pictures.jsonl").write_text(json.dumps(rows))
    picture = tmp_path / "data/2.png"
    content = picture.read_bytes()
    picture.unlink()
    encoder = make_encoder(meta)
    assert len(build_index(encoder, cache_dir=tmp_path, progress=False)) == 11
    picture.write_bytes(content)
    (late,) = build_indexes([encoder], cache_dir=tmp_path, progress=False, look_again=True)
    assert_equal(late, build_index(encoder, progress=False))


def test_a_cache_that_cannot_be_locked_is_read_all_the_same(tmp_path, monkeypatch, caplog):
    meta = tiny.write_tiny_data(tmp_path / "data")
    (tmp_path / "data/2.png").unlink()
    encoder = make_encoder(meta)
    first = build_index(encoder, cache_dir=tmp_path, progress=False)
    (lock,) = tmp_path.glob("pictures-*.lock")
    lock.unlink()
    lock.mkdir()
    (again,) = build_indexes([encoder], cache_dir=tmp_path, progress=False, look_again=True)
    assert_equal(again, first)
    assert "cannot be locked" in caplog.text


def test_many_rejects_are_kept(tmp_path):
    """300,000 messages of 200 characters are more than the notes of a Parquet file may hold."""
    rejects = tuple(
        Reject("d", "f", n, None, "file_missing", "x" * 200, offset=n, digest=f"{n:016x}") for n in range(300_000)
    )
    written = replace(concatenate([]), rejects=rejects, end=7)
    write_index(tmp_path / "index.parquet", written)
    assert read_index(tmp_path / "index.parquet").rejects == rejects


def test_a_store_that_fails_once_is_asked_again(tmp_path, monkeypatch):
    """Each picture fails at its first opening; with two further tries every row is measured."""
    meta = tiny.write_tiny_data(tmp_path)
    failed = set()
    real = MediaReader.image_size

    def flaky(self, path):
        if path not in failed:
            failed.add(path)
            raise MediaError("file_unreadable", "connection lost")
        return real(self, path)

    monkeypatch.setattr(MediaReader, "image_size", flaky)
    assert len(build_index(make_encoder(meta, retries=2), workers=1, progress=False)) == 12
    failed.clear()
    assert len(build_index(make_encoder(meta, retries=0), workers=1, progress=False)) < 12
