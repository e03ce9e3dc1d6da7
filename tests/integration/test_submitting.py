"""`launcher=slurm` up to the door of Slurm: what is checked, and the script that sbatch is given."""

import sys
from pathlib import Path

import pytest

from tests.commands import train

SETTINGS = ("model=custom", "model.random_weights=true", "stages=[2]", "data.meta=META", "data.packs_per_step=32")
# It keeps the script it is given, where the test finds it.
SBATCH = '#!/bin/sh\ncp "$1" "$(dirname "$0")/script"\necho Submitted batch job 41\n'


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder with an sbatch and an srun, the only one on the path besides Python's and the shell's."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sbatch", "srun"):
        (folder / name).write_text(SBATCH)
        (folder / name).chmod(0o755)
    for name in ("sh", "cp", "dirname"):
        (folder / name).symlink_to(Path("/bin", name) if Path("/bin", name).exists() else Path("/usr/bin", name))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_the_job_that_is_submitted(programs, tmp_path):
    """Our signal stands in the place of submitit's USR2@90, and srun leaves the end to the launching processes."""
    run = tmp_path / "run"
    own = ("launcher=slurm_4x8", "launcher.partition=big", "launcher.setup=['module load cuda']", f"run_dir={run}")
    result = train(*SETTINGS, *own, "+launcher.options.mem=0", "+launcher.options.exclusive=true")
    assert result.returncode == 0, result.stderr
    assert "job 41: 4 nodes with 8 processes and 8 GPUs each, 1440 minutes" in result.stdout
    assert f"tail -F {run}/slurm/41_0_log.out" in result.stdout
    script = (programs / "script").read_text()
    given = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if line[:9] == "#SBATCH -"
    )
    assert (
        given.items()
        >= {
            "job-name": "run",
            "nodes": "4",
            "ntasks-per-node": "8",
            "gpus-per-node": "8",
            "time": "1440",
            "partition": "big",
            "signal": "USR1@600",
            "requeue": "",
            "open-mode": "append",
            "mem": "0",
            "exclusive": "",
        }.items()
    )
    lines = script.splitlines()
    (task,) = [line for line in lines if line.startswith("srun ")]
    assert "--kill-on-bad-exit=0 --wait=60" in task
    assert sys.executable in task
    assert lines.index("module load cuda") < lines.index(task)
    # Nothing of the run itself has begun here.
    assert [path.name for path in run.iterdir() if path.name != "train.log"] == ["slurm"]


def test_wrong_settings_are_not_submitted(programs, tmp_path):
    result = train(*SETTINGS, "launcher=slurm_8x8", f"run_dir={tmp_path}/run")
    assert result.returncode == 1
    assert "data.packs_per_step=32 cannot be dealt to 64 ranks evenly" in result.stderr
    assert not (programs / "script").exists()


def test_a_machine_without_slurm(programs, tmp_path):
    (programs / "sbatch").unlink()
    result = train(*SETTINGS, "launcher=slurm", f"run_dir={tmp_path}/run")
    assert result.returncode == 1
    assert "launcher=slurm finds no sbatch here" in result.stderr
