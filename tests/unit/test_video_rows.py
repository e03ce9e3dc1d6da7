"""Rows with a video from the index through the plan to a worker: what is planned is what is read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivl_lightning.data.contact_sheet import contact_sheet
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.media import MediaReader
from ivl_lightning.data.picture_tiles import picture_tiles
from ivl_lightning.structures import RowError
from tests import tiny

FRAMES = {"long.gif": 12, "short.gif": 3, "folder": 5}


def flat_frames(count: int) -> list[Image.Image]:
    """Each of another gray, so that a frame can be told by any of its pixels."""
    return [Image.new("RGB", (32, 32), (10 * number + 5,) * 3) for number in range(count)]


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    for name in ("long.gif", "short.gif"):
        first, *rest = flat_frames(FRAMES[name])
        first.save(tmp_path / name, save_all=True, append_images=rest, duration=500)
    (tmp_path / "folder").mkdir()
    for number, frame in enumerate(flat_frames(FRAMES["folder"])):
        frame.save(tmp_path / f"folder/clip_{number}.png")
    questions = ("<video>\nWhat?", "What?", "See <video>\nand say.", "?")
    rows = zip(("long.gif", "short.gif", "folder", "long.gif"), questions, strict=True)
    with (tmp_path / "videos.jsonl").open("w") as file:
        for number, (video, question) in enumerate(rows):
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Gray."}]
            clip = {"clip": [1, 3]} if number == 3 else {}
            file.write(json.dumps({"id": number, "video": video, "conversations": turns, **clip}) + "\n")
    entry = {"root": ".", "data_augment": False, "repeat_time": 1, "max_dynamic_patch": 1}
    content = {"videos": {**entry, "annotation": "videos.jsonl"}}
    (tmp_path / "meta.json").write_text(json.dumps(content))
    return tmp_path / "meta.json"


def module(meta: Path, **changes) -> DynamicPackingDataModule:
    options = {"min_frames": 2, "max_frames": 6, "packs_per_step": 1, "max_tokens": 400, **changes}
    data = DynamicPackingDataModule(
        tiny.tiny_data_config(meta, **options), tiny.load_tiny_tokenizer(), patch_size=tiny.PATCH_SIZE
    )
    data.setup("fit")
    return data


def test_the_index_knows_the_range_of_each_row(meta):
    """2 to 6 frames of 12, of 3, of 5, and of the 4 frames (half a second each) between seconds 1 and 3."""
    corpus = module(meta).train_corpus
    assert corpus.column("frames").tolist() == [6, 3, 5, 4]
    assert corpus.column("min_frames").tolist() == [2, 2, 2, 2]
    assert corpus.column("video_frames").tolist() == [12, 3, 5, 4]
    assert corpus.column("tiles").tolist() == [6, 3, 5, 4]
    assert corpus.column("video_seconds").tolist() == pytest.approx([6.0, 1.5, 5.0, 2.0])


def test_every_number_of_frames_costs_what_is_planned(meta):
    """Tokens of a row with n frames = tokens with the most - the lines of the frames that are missing."""
    corpus = module(meta).train_corpus
    for row in range(len(corpus)):
        _, record = corpus.locate(row)
        encoder, most = corpus.encoders[0], int(corpus.column("frames")[row])
        for frames in range(1, most + 1):
            encoded = encoder.encode(record, np.random.default_rng(0), frames=frames)
            assert len(encoded.input_ids) == corpus.plan_rows.planned_tokens(row, frames)
            assert len(encoded.pixel_values) == frames
        assert len(encoder.encode(record, None).input_ids) == corpus.column("tokens")[row]


def test_epochs_draw_frames_and_packs_hold_what_was_planned(meta):
    data = module(meta)
    drawn = set()
    for epoch in range(5):
        dataset = data.train_dataloader().dataset
        data.stream.begin(epoch)
        for planned in data.stream.packs(0, 1):
            batch = dataset[planned]
            assert not batch.rejects
            assert batch.input_ids.shape[1] == planned.pack.tokens <= 400
            assert len(batch.pixel_values) == planned.pack.tiles <= 16
            drawn.add(planned.pack.frames)
    assert {count for frames in drawn for count in frames} == {2, 3, 4, 5, 6}


def test_random_frames_rise_and_validation_takes_the_middle(meta):
    """Each of 3 intervals of 4 frames gives one; its middle is frame 2, 6 or 10 (grays 25, 65, 105)."""
    corpus = module(meta).train_corpus
    _, record = corpus.locate(0)
    encoder = corpus.encoders[0]
    seen = set()
    for seed in range(20):
        tiles = encoder.encode(record, np.random.default_rng(seed), frames=3).pixel_values
        frames = [(int(tile[0, 0, 0]) - 5) // 10 for tile in tiles]
        assert frames == sorted(frames)
        assert [frame // 4 for frame in frames] == [0, 1, 2]
        seen.add(tuple(frames))
    assert len(seen) > 5
    middle = [(int(tile[0, 0, 0]) - 5) // 10 for tile in encoder.encode(record, None, frames=3).pixel_values]
    assert [frame // 4 for frame in middle] == [0, 1, 2]
    assert all(frame % 4 in (1, 2) for frame in middle)


def test_a_fixed_rate_fixes_the_number(meta):
    """fps1 of 6 s, 1.5 s, 5 s and 2 s; at most 6."""
    corpus = module(meta, frame_sampling="fps1").train_corpus
    assert corpus.column("frames").tolist() == corpus.column("min_frames").tolist()
    assert corpus.column("frames").tolist()[0] == 6
    with pytest.raises(ValueError, match="fps"):
        module(meta, frame_sampling="fsp1")


def test_a_video_over_the_caps_is_rejected_or_shrinks(meta):
    over = module(meta, max_pack_tiles=4, reject_limit=1.0).train_corpus
    assert [(line.line, line.reason) for line in over.rejects] == [(1, "over_length"), (3, "over_length")]
    shrunk = module(meta, max_pack_tiles=4, over_length="shrink").train_corpus
    assert shrunk.column("frames").tolist() == [4, 3, 4, 4]


def test_truncated_videos_keep_their_number_of_frames(meta):
    """A cut at 330 tokens falls behind the frames of some rows: what is read is what was planned."""
    data = module(meta, max_sample_tokens=230, over_length="truncate", reject_limit=1.0)
    assert len(data.train_corpus)
    for epoch in range(3):
        data.stream.begin(epoch)
        dataset = data.train_dataloader().dataset
        data.stream.begin(epoch)
        for planned in data.stream.packs(0, 1):
            assert not dataset[planned].rejects


def test_another_maximum_of_frames_is_another_plan(meta):
    data = module(meta)
    batches = data.train_dataloader()
    data.note_trained(next(iter(batches)))
    with pytest.raises(ValueError, match=r"data.max_frames=6, this run has 8"):
        module(meta, max_frames=8).load_state_dict(data.state_dict())


def test_a_video_that_shrank_is_named(meta):
    """Measured with 12 frames, it has 2 now: a plan of 3 is refused, where frames would have to be repeated."""
    corpus = module(meta).train_corpus
    _, record = corpus.locate(0)
    first, *rest = flat_frames(2)
    first.save(meta.parent / "long.gif", save_all=True, append_images=rest, duration=500)
    with pytest.raises(RowError, match="2 frames now, and 3 were planned"):
        corpus.encoders[0].encode(record, np.random.default_rng(0), frames=3)


def test_a_video_that_breaks_later_is_left_out(meta):
    data = module(meta)
    (meta.parent / "long.gif").write_bytes(b"GIF89a")
    batches = list(data.train_dataloader())
    assert {line.line for batch in batches for line in batch.rejects} == {1, 4}
    assert len([name for batch in batches for name in batch.sample_ids]) == 2


def test_frames_stay_below_the_root(meta):
    reader = MediaReader(str(meta.parent / "folder"))
    with pytest.raises(ValueError, match="leads outside"):
        reader.video_header("../long.gif")


def test_a_sheet_shows_every_frame(meta, tmp_path):
    """6 of 12 frames, of each pair the first one: grays 5, 25, ... 105, with gaps of another gray between them."""
    data = module(meta)
    _, record = data.train_corpus.locate(0)
    encoder = data.train_corpus.encoders[0]
    (video,) = picture_tiles(encoder, record, encoder.encode_prompt(record)[1])
    assert (video.name, video.note, video.cols, video.rows) == ("long.gif", "6 frames, one tile each", 6, 1)
    sheet = np.asarray(contact_sheet(video).convert("L"))
    assert sheet.shape == (32, 6 * 32 + 5 * 2)
    assert sheet[16, 16::34].tolist() == [5, 25, 45, 65, 85, 105]
    assert set(sheet[:, 32]) == set(sheet[:, 33]) == {179}
