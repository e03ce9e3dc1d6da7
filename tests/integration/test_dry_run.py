"""`dry_run=true`: the chain is printed, and nothing is done."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.commands import environment
from tests.tiny import write_tiny_data

# Prints what a dry run must not do: load torch, start a process, write a file or make a folder.
WATCHED = """
import atexit, os, sys
def watch(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec"):
        print("STARTED", event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        print("WROTE", arguments[0])
sys.argv = ["train.py", *sys.argv[1:]]
from ivl_lightning.cli.train import main
sys.addaudithook(watch)
atexit.register(lambda: print("TORCH", "torch" in sys.modules))
main()
"""


@pytest.fixture
def dry(tmp_path):
    """Runs the command in an empty folder that must stay empty; gives its exit code, output and errors."""

    def run(*arguments):
        here, aside = tmp_path / "here", tmp_path / "aside"
        here.mkdir()
        aside.mkdir()
        result = subprocess.run(
            [sys.executable, "-B", "-c", WATCHED, *arguments, "dry_run=true"],
            cwd=here,
            env={**environment(), "COLUMNS": "100", "TMPDIR": str(aside)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not [*here.iterdir(), *aside.iterdir()]
        lines = result.stdout.splitlines()
        assert "TORCH False" in lines
        assert not [line for line in lines if line.startswith("STARTED")]
        # Hydra's log, thrown away with its folder.
        assert all(str(aside) in line for line in lines if line.startswith("WROTE"))
        assert all(len(line) <= 100 for line in lines if not line.startswith("WROTE"))
        return result.returncode, " ".join(result.stdout.split()), result.stderr

    return run


def in_order(text, *parts):
    """Whether the parts stand in a text one behind the other."""
    for part in parts:
        _, found, text = text.partition(part)
        assert found, f"{part!r} does not come"
    return True


def test_a_published_recipe_without_anything_given(dry):
    """What to give is listed once in the end, with the stages that need it; the numbers are the recipe's."""
    code, text, errors = dry("recipe=internvl2_5_8b", "stages=[1,2]")
    assert code == 0, errors
    assert in_order(
        text,
        "recipe internvl2_5_8b",
        "run folder runs/internvl2_5_8b",
        "1 mlp_warmup trains projector",
        "missing: weights to start from: give model.path=FOLDER or init_from=RUN",
        "missing: data.meta=FILE, an official meta.json",
        "lr 2e-4, warm-up 100 steps",
        "2 instruction_tuning trains vision, projector, llm",
        "starts from weights of mlp_warmup",
        "5,500 steps, at most 46.1 B tokens",
        "512 packs of at most 16,384 tokens and 48 tiles",
        "lr 4e-5, warm-up 3% (165 steps)",
        "missing data.meta=FILE, an official meta.json [mlp_warmup, instruction_tuning]",
    )


@pytest.fixture
def short_folder():
    """One whose path fits into a line of 100 columns."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


def test_steps_on_data_of_one_s_own(dry, short_folder):
    """12 pictures and 12 texts, each seen 1.5 times, are 36 samples: 8 steps of 5; two epochs are 16."""
    meta = write_tiny_data(short_folder, repeat_time=1.5)
    code, text, errors = dry(
        f"data.meta={meta}",
        "stages=[2]",
        "data.batch_samples=5",
        "data.packs_per_step=4",
        "data.max_tokens=500",
        "trainer.max_steps=null",
        "trainer.max_epochs=2",
        "trainer.devices=2",
        "strategy=ddp",
    )
    assert code == 0, errors
    assert in_order(
        text,
        "starts from random weights",
        f"data {meta}: 2 datasets, 24 rows",
        "pictures 12 rows x 1.5",
        "text 12 rows x 1.5",
        "validation none",
        "2 epochs, 16 steps if no row is rejected, at most 32 k tokens",
        "5 conversations in 4 packs of at most 500 tokens",
        "1 node x 2 devices (ddp), accumulation 2",
        "nothing is missing",
    )


def test_a_multirun_of_the_miniature(dry):
    """Each job's chain with the run folder it would have; its data are made in place."""
    code, text, errors = dry("-m", "optim.lr=1e-5,2e-5", "run_dir=R")
    assert code == 0, errors
    job = (
        "1 language_warmup trains llm",
        "starts from random weights",
        "2 mlp_warmup trains projector",
        "3 vit_incremental trains vision, projector",
        "4 instruction_tuning trains vision, projector, llm",
        "5 mixed_preference trains vision, projector, llm",
        "made by miniature.pairs.prepare_pairs",
        "0.8 preference + 0.2 quality + 1 generation",
        "nothing is missing",
    )
    first, second = text.split("run folder R/1")
    assert in_order(first, "run folder R/0", "R/0/miniature/language_meta.json", "lr 1e-5", "nothing is missing")
    assert in_order(second, *job)
    assert "lr 2e-5" in second


def test_wrong_settings_end_a_dry_run_as_any_other(dry):
    code, _, errors = dry("recipe=internvl2_5_8b", "trainer.devices=3")
    assert code == 1
    assert "data.packs_per_step=512 cannot be dealt to 3 ranks evenly" in errors
    assert "Traceback" not in errors
