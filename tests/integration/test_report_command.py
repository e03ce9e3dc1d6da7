"""`ivl-report`: the report of a run folder, of each job of a multirun, and what it says where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest

from ivl_lightning.cli.report import write_reports
from ivl_lightning.config.check import ConfigError
from tests.commands import ROOT, environment


def begin(run: Path) -> None:
    """A stage that has only started."""
    (run / "mlp_warmup").mkdir(parents=True)
    (run / "mlp_warmup/config.yaml").write_text("recipe: {name: small}\n")


def test_the_command_writes_the_page_without_torch(tmp_path):
    """A run that goes on, and a setting that is none."""
    begin(tmp_path / "run")
    code = "import sys, atexit; from ivl_lightning.cli.report import main\n"
    code += "atexit.register(lambda: print('TORCH', 'torch' in sys.modules)); main()"
    results = [
        subprocess.run(
            [sys.executable, "-c", code, f"run_dir={tmp_path}/run", *more],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        for more in ([], ["rundir=x"])
    ]
    assert [result.returncode for result in results] == [0, 2], results[0].stderr
    assert results[0].stdout.splitlines() == [f"report: {tmp_path}/run/report.html", "TORCH False"]
    assert "mlp_warmup <em>(not finished)</em>" in (tmp_path / "run/report.html").read_text()
    assert "rundir is not a setting. Did you mean run_dir?" in results[1].stderr


def test_each_job_of_a_multirun_gets_its_own(tmp_path):
    """In the order of their numbers; what is no job is left alone."""
    for name in ("10", "2", "aside"):
        begin(tmp_path / name)
    (tmp_path / "7").mkdir()
    assert write_reports(tmp_path) == [tmp_path / "2/report.html", tmp_path / "10/report.html"]
    assert not (tmp_path / "aside/report.html").exists()


@pytest.mark.parametrize("folder", ["empty", "not/there"])
def test_a_folder_without_a_run_is_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"run_dir={tmp_path}/{folder} holds no run"):
        write_reports(tmp_path / folder)
