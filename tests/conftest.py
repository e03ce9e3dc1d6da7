import os

# One thread per test process: with two of them on two cores, torch's own threads would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
from pathlib import Path

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)
# Commands that the tests start measure rows into a folder of this session's own.
os.environ["IVL_LIGHTNING_CACHE"] = tempfile.mkdtemp(prefix="ivl-index-")
# Where W&B keeps pictures of offline runs until they are sent, by default in the user's home.
os.environ["WANDB_DATA_DIR"] = tempfile.mkdtemp(prefix="ivl-wandb-")


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.load_tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny.build_tiny_model(tokenizer)


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    return tiny.write_tiny_data(tmp_path / "data")
