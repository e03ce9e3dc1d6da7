"""Reference log-probabilities on disk: computed once, reused, completed; nothing of another model is taken.

Run as a module it is a process of its own that starts runs over one cache, kills one and lets two others meet.
"""

import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ivl_lightning.config.schema import OptimConfig
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.data.reference_cache import ReferenceCache, row_keys
from ivl_lightning.models.tokenizer import load_tokenizer
from ivl_lightning.stages import reference as reference_pass
from ivl_lightning.stages.mixed_preference import MixedPreference
from tests import tiny
from tests.commands import run_module

ROOT = Path(__file__).parents[2]
OTHER_TOKENIZER = ROOT / "tests/fixtures/conversation/qwen2_bytebpe"


def module(meta, tokenizer, *, seed=0, template="internvl2_5", **changes):
    options = {"max_tokens": 1200, "batch_pairs": 6, "packs_per_step": 2, "reject_limit": 1.0, **changes}
    config = tiny.tiny_data_config(meta, **options)
    return PreferenceDataModule(config, tokenizer, seed=seed, template=template, patch_size=tiny.PATCH_SIZE)


def make_stage(tokenizer, *, weights=0, kind=MixedPreference):
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    return kind(lambda: tiny.build_tiny_model(tokenizer, seed=weights), optim=optim)


def make_trainer(folder, **options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **{"max_epochs": 1, **options},
    )


class Runs:
    """Fits over one cache folder."""

    def __init__(self, folder: Path, tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.cache = folder / "cache"
        self.meta = tiny.write_tiny_pairs(folder / "data")

    def fit(self, *, name="run", weights=0, trainer=None, **changes) -> PreferenceDataModule:
        data = module(self.meta, self.tokenizer, **{"cache_dir": str(self.cache), **changes})
        self.trainer = make_trainer(self.folder / name, **(trainer or {}))
        self.trainer.fit(make_stage(self.tokenizer, weights=weights), data)
        return data

    def parts(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sorted(self.cache.glob("reference-*/*.parquet"))}

    def folders(self) -> set[Path]:
        return {path.parent for path in self.parts()}


@pytest.fixture
def runs(tmp_path, tokenizer):
    return Runs(tmp_path, tokenizer)


def keys_in(paths):
    return [key for path in paths for key in pq.read_table(path)["key"].to_pylist()]


@pytest.fixture
def corpus(tmp_path, tokenizer):
    data = module(tiny.write_tiny_pairs(tmp_path / "data"), tokenizer)
    data.setup("fit")
    return data.train_corpus


def test_what_was_added_is_found_and_the_rest_is_missing(corpus, tmp_path):
    """Rows 5, 2 and 9, in two parts: theirs are known by content, all others are NaN."""
    cache = ReferenceCache(tmp_path, {"weights": "w"})
    assert cache.look_up(corpus).missing.tolist() == list(range(24))
    keys = row_keys(corpus)
    assert len(set(keys.tolist())) == 24
    cache.add(keys[[5, 2]].tolist(), np.array([[-1.5, -2.5], [-3.0, -4.0]], np.float32), [7, 2**32 - 1])
    cache.add(keys[[9]].tolist(), np.array([[-5.0, -6.0]], np.float32), [8])
    known = ReferenceCache(tmp_path, {"weights": "w"}).look_up(corpus)
    assert known.logps[[5, 2, 9]].tolist() == [[-1.5, -2.5], [-3.0, -4.0], [-5.0, -6.0]]
    assert known.checksums[[5, 2, 9]].tolist() == [7, 2**32 - 1, 8]
    assert known.missing.tolist() == sorted(set(range(24)) - {5, 2, 9})
    assert json.loads((cache.folder / "settings.json").read_text())["weights"] == "w"


@pytest.mark.parametrize("name", ["weights", "dtype", "attention", "augmentation_seed"])
def test_another_reference_has_another_folder(corpus, tmp_path, name):
    deciding = {"weights": "w", "dtype": "float32", "attention": ["a", "b"], "augmentation_seed": 0}
    cache = ReferenceCache(tmp_path, deciding)
    cache.add(row_keys(corpus).tolist(), np.zeros((24, 2), np.float32), [0] * 24)
    assert len(cache.look_up(corpus).missing) == 0
    other = ReferenceCache(tmp_path, {**deciding, name: "other"})
    assert other.folder != cache.folder
    assert len(other.look_up(corpus).missing) == 24


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"seed": 5}, True),
        ({"packs_per_step": 4, "batch_pairs": 4}, True),
        ({"max_tokens": 1300}, True),
        ({"max_pack_tiles": 17}, True),
        ({"template": "Hermes-2"}, False),
        ({"image_labels": "auto"}, False),
        ({"use_thumbnail": False}, False),
        ({"max_tiles": 3}, False),
        ({"resize": "fast"}, False),
        ({"over_length": "shrink"}, False),
    ],
)
def test_a_pair_is_known_by_content_and_by_what_makes_its_input(corpus, tokenizer, changes, same):
    """Caps that only reject, run seed and packing are none of it; what changes ids or pixels is."""
    data = module(Path(corpus.specs[0].annotation).parent / "pairs.json", tokenizer, **changes)
    data.setup("fit")
    known, other = set(row_keys(corpus).tolist()), set(row_keys(data.train_corpus).tolist())
    assert len(other) == 24
    assert (known == other) == same
    assert same or not known & other


def test_another_vocabulary_makes_other_pairs(corpus):
    data = module(Path(corpus.specs[0].annotation).parent / "pairs.json", load_tokenizer(OTHER_TOKENIZER))
    data.setup("fit")
    assert not set(row_keys(corpus).tolist()) & set(row_keys(data.train_corpus).tolist())


def test_the_same_pair_in_another_place_is_known(corpus, tokenizer):
    """Lines turned round and the data set under another name: the keys of all rows are still there."""
    meta = Path(corpus.specs[0].annotation).parent / "pairs.json"
    wanted = set(row_keys(corpus).tolist())
    content = json.loads(meta.read_text())
    for entry in content.values():
        path = meta.parent / entry["annotation"]
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    meta.write_text(json.dumps({f"other {name}": entry for name, entry in content.items()}))
    data = module(meta, tokenizer)
    data.setup("fit")
    assert set(row_keys(data.train_corpus).tolist()) == wanted


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"PAR1" + bytes(len(content) - 4),
    "head": lambda content: bytes(16) + content[16:],
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_part_is_named_and_its_pairs_are_missing(corpus, tmp_path, caplog, damage):
    """The other part is still read; the damaged one is gone, so that it is named once."""
    cache = ReferenceCache(tmp_path, {})
    keys = row_keys(corpus).tolist()
    cache.add(keys[:10], np.ones((10, 2), np.float32), range(10))
    (broken,) = cache.folder.glob("*.parquet")
    cache.add(keys[10:], np.full((14, 2), 2.0, np.float32), range(14))
    broken.write_bytes(DAMAGES[damage](broken.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cache.look_up(corpus).missing.tolist() == list(range(10))
    assert f"{broken} is damaged" in caplog.text
    assert not broken.exists()
    caplog.clear()
    cache.add(keys[:10], np.ones((10, 2), np.float32), range(10))
    assert len(cache.look_up(corpus).missing) == 0
    assert not caplog.text


def test_a_flipped_bit_gives_no_other_number(corpus, tmp_path):
    """One bit in every seventh byte of a part, one at a time: what is still known of a pair is what was written.

    Where the part is unreadable, or a pair's key is another one now, its pairs are missing and computed again.
    """
    cache = ReferenceCache(tmp_path, {})
    numbers = -np.random.default_rng(0).random((24, 2)).astype(np.float32)
    cache.add(row_keys(corpus).tolist(), numbers, range(24))
    (part,) = cache.folder.glob("*.parquet")
    content = part.read_bytes()
    for place in range(4, len(content), 7):
        part.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        found = cache.look_up(corpus)
        known = np.isfinite(found.logps).all(axis=1)
        assert np.array_equal(found.logps[known], numbers[known]), place
        assert np.array_equal(found.checksums[known], np.arange(24)[known]), place


def test_what_a_killed_writer_leaves_is_passed_over(corpus, tmp_path):
    cache = ReferenceCache(tmp_path, {})
    cache.add(row_keys(corpus).tolist(), np.ones((24, 2), np.float32), [0] * 24)
    (part,) = cache.folder.glob("*.parquet")
    (cache.folder / f"{part.name}.77.tmp").write_bytes(part.read_bytes()[:50])
    assert len(cache.look_up(corpus).missing) == 0


def test_a_pass_scores_every_pair_once_and_a_second_fit_none(runs):
    """19 pairs of training and 5 of validation, two settings: 24 keys; then no part is written or touched."""
    data = runs.fit(val_rows=5)
    parts = runs.parts()
    keys = keys_in(parts)
    assert len(keys) == len(set(keys)) == len(data.train_corpus) + len(data.val_corpus)
    assert len(runs.folders()) == 1
    again = runs.fit(val_rows=5, name="again", seed=3)
    assert runs.parts() == parts
    assert again.unscored() == []
    assert reference_pass.score_missing(None, again, runs.trainer) == 0


def test_a_partial_cache_completes_itself(runs):
    """One step of 6 pairs scores 6; the whole epoch then adds the other 18 and leaves the first part alone."""
    runs.fit(trainer={"max_steps": 1, "max_epochs": None})
    first = runs.parts()
    assert len(keys_in(first)) == 6
    runs.fit(name="whole")
    assert {path: stamp for path, stamp in runs.parts().items() if path in first} == first
    keys = keys_in(runs.parts())
    assert len(keys) == len(set(keys)) == 24


def test_a_damaged_cache_completes_itself(runs, caplog):
    """The same log-probabilities as before, to rounding: the pairs share their packs with others now."""
    before = runs.fit()
    wanted = before.reference.look_up(before.train_corpus)
    (part,) = runs.parts()
    content = pq.read_table(part)
    part.unlink()
    for number, rows in enumerate((content.slice(0, 7), content.slice(7))):
        pq.write_table(rows, part.with_name(f"{number}.parquet"))
    broken = part.with_name("0.parquet")
    broken.write_bytes(broken.read_bytes()[:-20])
    after = runs.fit(name="again")
    assert f"{broken} is damaged" in caplog.text
    assert sorted(keys_in(runs.parts())) == sorted(content["key"].to_pylist())
    found = after.reference.look_up(after.train_corpus)
    np.testing.assert_allclose(found.logps, wanted.logps, atol=1e-4, rtol=0)
    assert np.array_equal(found.checksums, wanted.checksums)


def test_the_cache_is_the_reference(runs, tokenizer):
    """What is kept of a pair is what the model as built gives for it alone, with pictures and without."""
    runs.meta.write_text(runs.meta.read_text().replace('"data_augment": true', '"data_augment": false'))
    data = runs.fit()
    known = data.reference.look_up(data.train_corpus)
    stage = make_stage(tokenizer)
    stage.configure_model()
    stage.root.eval()
    for row in (0, 13, 23):
        dataset, record = data.train_corpus.locate(row)
        pair = data.train_corpus.encoders[dataset].encode_pair(record, None)
        with torch.no_grad():
            logps = stage.root(tiny.pair_batch([pair]))[0]
        np.testing.assert_allclose(known.logps[row], logps.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "folders"),
    [
        ({"weights": 1}, 2),
        ({"trainer": {"precision": "bf16-mixed"}}, 2),
        ({"augmentation_seed": 1}, 2),
        ({"template": "Hermes-2"}, 1),
        ({"max_tiles": 2}, 1),
    ],
)
def test_nothing_of_another_input_or_model_is_reused(runs, changes, folders):
    """Another model, dtype or augmentation seed: another folder. Another template or tiling: other keys in the same."""
    runs.fit()
    first = runs.parts()
    data = runs.fit(name="other", **changes)
    assert len(runs.folders()) == folders
    added = [path for path in runs.parts() if path not in first]
    assert len(keys_in(added)) == 24
    assert set(keys_in(added)) == set(row_keys(data.train_corpus).tolist())
    if folders == 1:
        assert not set(keys_in(added)) & set(keys_in(first))


def test_another_picture_under_the_same_name_is_stale(runs):
    """Same size, other pixels, after the pass: the pair is named and left out, and the folder to delete is told.

    Row 2 alone uses 1.png.
    """
    runs.fit()
    picture = runs.meta.parent / "1.png"
    shutil.copy(picture, runs.folder / "kept.png")
    tiny.Image.open(runs.folder / "kept.png").transpose(tiny.Image.Transpose.ROTATE_180).save(picture)
    data = runs.fit(name="again")
    assert data.ledger.counts == {"reference_stale": 1}
    (line,) = (json.loads(text) for text in (runs.folder / "again/ledger.jsonl").read_text().splitlines())
    assert (line["dataset"], line["line"], line["counted"]) == ("pictures_pairs", 2, True)
    (folder,) = runs.folders()
    assert f"Delete the folder {folder} to compute them again" in line["message"]
    shutil.rmtree(folder)
    assert not runs.fit(name="healed").ledger.counts


def test_pairs_without_a_reference_are_named(corpus, tokenizer, tmp_path):
    """A loader over a cache that knows 20 of 24 pairs leaves 4 out."""
    data = module(Path(corpus.specs[0].annotation).parent / "pairs.json", tokenizer, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    batches = list(data.train_dataloader())
    checksums = {row: value for b in batches for row, value in zip(b.sample_rows, b.checksums, strict=True)}
    data.open_reference({"weights": "w"})
    keys = row_keys(corpus)
    data.reference.add(keys[:20].tolist(), np.zeros((20, 2), np.float32), [checksums[row] for row in range(20)])
    batches = list(data.train_dataloader())
    assert sorted(row for batch in batches for row in batch.sample_rows) == list(range(20))
    assert [line.reason for batch in batches for line in batch.rejects] == ["reference_missing"] * 4
    assert all(torch.equal(batch.reference_logps, torch.zeros(batch.num_pairs, 2)) for batch in batches)


@pytest.mark.parametrize("val_rows", [0, 23])
def test_a_pair_that_cannot_be_read_stops_no_later_start(runs, val_rows):
    """Broken after it was measured: left out and listed once, by the first start and by the ones behind it.

    Also where it is held back for validation.
    """
    data = module(runs.meta, runs.tokenizer, cache_dir=str(runs.cache))
    data.prepare_data()
    for path in runs.meta.parent.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
        if val_rows == 0:
            break
    counts = [runs.fit(val_rows=val_rows).ledger.counts for _ in range(3)]
    assert counts[0]
    assert set(counts[0]) == {"image_truncated"}
    assert counts == [counts[0]] * 3


# -- processes ----------------------------------------------------------------------------------------------------


class Meeting(MixedPreference):
    """Waits before the pass until another run has come as far."""

    def on_fit_start(self) -> None:
        folder = Path(os.environ["MEETING"])
        (folder / f"ready-{os.getpid()}").write_text("")
        deadline = time.monotonic() + 60
        while len(list(folder.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        super().on_fit_start()


def start(folder: Path, name: str, kind: type[MixedPreference] = MixedPreference) -> int:
    """A fit in a process of its own; its id. Parts are written after every pack."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.WARNING, force=True)
    status = 1
    try:
        reference_pass._KEEP_SECONDS, reference_pass._WAIT_SECONDS = 0.0, 0.05
        tokenizer = tiny.load_tiny_tokenizer()
        cache = str(folder / name.rstrip("12") / "cache")
        data = module(folder / "data/pairs.json", tokenizer, cache_dir=cache, max_tokens=300, packs_per_step=6)
        make_trainer(folder / name).fit(make_stage(tokenizer, kind=kind), data)
        status = 0
    finally:
        logging.exception("ended") if status else None
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Kill a run in its pass, keep what it left, start it again; then two runs at once."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    tiny.write_tiny_pairs(folder / "data", rows=24)
    found = {}
    victim = start(folder, "killed")
    while len(list((folder / "killed/cache").glob("reference-*/*.parquet"))) < 2:
        time.sleep(0.0005)
    os.kill(victim, signal.SIGKILL)
    found["killed"] = os.waitpid(victim, 0)[1]
    left = {str(path): path.stat().st_mtime_ns for path in (folder / "killed/cache").glob("reference-*/*.parquet")}
    found["left"] = left
    found["again"] = os.waitpid(start(folder, "killed"), 0)[1]
    os.environ["MEETING"] = str(folder)
    both = [start(folder, f"both{number}", Meeting) for number in (1, 2)]
    found["both"] = [os.waitpid(pid, 0)[1] for pid in both]
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run = run_module("tests.unit.test_reference_cache", folder, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, json.loads((folder / "found.json").read_text())


def log_of(folder, name):
    return (folder / f"{name}.log").read_text()


def test_a_killed_pass_goes_on_where_it_was(processes):
    """SIGKILL behind the second part of 48 pairs: the second start computes the others, and none of them twice."""
    folder, found = processes
    assert found["killed"] == signal.SIGKILL
    assert found["again"] == 0, log_of(folder, "killed")
    kept = keys_in(Path(path) for path in found["left"])
    assert 0 < len(kept) < 48
    parts = sorted((folder / "killed/cache").glob("reference-*/*.parquet"))
    assert {str(path): path.stat().st_mtime_ns for path in parts if str(path) in found["left"]} == found["left"]
    keys = keys_in(parts)
    assert len(keys) == len(set(keys)) == 48


def test_two_runs_at_once_score_each_pair_once(processes):
    """One of them computes, the other says that it waits; both train."""
    folder, found = processes
    assert found["both"] == [0, 0], log_of(folder, "both1") + log_of(folder, "both2")
    keys = keys_in((folder / "both/cache").glob("reference-*/*.parquet"))
    assert len(keys) == len(set(keys)) == 48
    waited = ["another run computes the same" in log_of(folder, f"both{number}") for number in (1, 2)]
    assert sorted(waited) == [False, True]


if __name__ == "__main__":
    main()
