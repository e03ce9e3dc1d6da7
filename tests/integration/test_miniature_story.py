"""The claim of `make train`, minutes long: each stage lifts the score, and stage 2 ends where it should."""

import json

import pytest

from ivl_lightning.constants import STAGES
from tests.commands import train

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("seed", [0, 1])
def test_the_story_is_true(seed, tmp_path):
    """Text-only floor < stage 1 < stage 1.5 < stage 2; at the end 90 % in the mean and no kind below 75 %."""
    result = train(f"run_dir={tmp_path}", f"seed={seed}", threads=2, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    scores = [json.loads((tmp_path / stage / "done.json").read_text())["scores"] for stage in STAGES]
    floor, warmed, seeing, tuned = (score["val/exact_match"] for score in scores)
    assert floor + 0.1 < warmed
    assert warmed + 0.1 < seeing
    assert seeing < tuned
    assert tuned >= 0.9
    kinds = {name: score for name, score in scores[-1].items() if name.startswith("val/exact_match/")}
    assert len(kinds) >= 4
    assert min(kinds.values()) >= 0.75, kinds
