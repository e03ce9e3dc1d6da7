"""Preference training killed with SIGKILL goes on when the same command is given again: losses, shift, reference."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ivl_lightning.reporting.logged_metrics import read_metrics
from tests import tiny
from tests.commands import kill_behind, logged_steps, own_arguments, train

STEPS = 10
COLUMNS = ("train/loss", "train/shift", "train/rewards_chosen", "train/rewards_rejected", "train/loss_quality")


def measured(run: Path) -> dict[int, dict[str, float]]:
    """Loss, shift and rewards by step, of all attempts; a step that was trained twice keeps the later values."""
    rows = read_metrics(run / "mixed_preference").by_step.items()
    return {step: {name: row[name] for name in COLUMNS} for step, row in rows if "train/loss" in row}


def scored(cache: Path) -> dict[str, int]:
    """Parts of the reference cache, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("reference-*/*.parquet")}


@pytest.mark.soak
def test_killed_and_started_again(tmp_path, monkeypatch):
    """Every step's loss, shift and rewards equal those of a run that was never killed, to the last printed digit.

    24 pairs, 5 a step: two epochs of five steps, killed in the second one. The reference is computed by the first start
    alone: neither the second one, whose policy has moved on, nor another run of the same weights writes a part.
    """
    cache = tmp_path / "cache"
    monkeypatch.setenv("IVL_LIGHTNING_CACHE", str(cache))
    base = [argument for argument in own_arguments(tmp_path, steps=STEPS) if not argument.startswith("stages=")]
    options = [
        *base,
        "stages=[mpo]",
        f"data.meta={tiny.write_tiny_pairs(tmp_path / 'data')}",
        "data.batch_pairs=5",
        "data.packs_per_step=2",
        "data.max_tokens=1200",
        "stage.drop_path_rate=0.0",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "trainer.checkpoint_every_n_steps=1",
    ]
    killed = tmp_path / "killed"
    saved = kill_behind(killed / "mixed_preference", "step=0000000[6-8].ckpt", *options)
    lines = len(logged_steps(killed / "mixed_preference"))
    parts = scored(cache)
    assert parts

    with ThreadPoolExecutor() as pool:
        for run in pool.map(lambda name: train(*options, f"run_dir={tmp_path / name}"), ("killed", "whole")):
            assert run.returncode == 0, run.stderr[-3000:]
    assert scored(cache) == parts

    assert json.loads((killed / "mixed_preference/done.json").read_text())["steps"] == STEPS
    assert min(logged_steps(killed / "mixed_preference")[lines:]) == saved + 1
    ours, wanted = measured(killed), measured(tmp_path / "whole")
    assert sorted(ours) == list(range(1, STEPS + 1))
    assert ours == wanted
    assert len({step["train/shift"] for step in wanted.values()}) >= STEPS - 1, "the shift moves with every step"
