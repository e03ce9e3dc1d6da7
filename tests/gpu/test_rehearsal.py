"""The GPU check itself runs to its end on a CPU: whoever has a device for minutes shall not meet its errors there."""

import json
import os
import subprocess
import sys

from tests.commands import ROOT


def test_the_check_runs_on_a_cpu(tmp_path):
    """All parts find something, none fails, and nothing is imported that a GPU machine may lack."""
    found = tmp_path / "gpu.json"
    code = (
        "import sys, runpy; "
        "sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'lightning', 'torchmetrics', 'pydantic'))); "
        "runpy.run_module('tests.gpu.check', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, str(found), "--rehearse"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    report = json.loads(found.read_text())
    assert report["failed"] == []
    assert set(report) == {"machine", "equality", "head", "step", "profile", "failed"}
    assert all(entry["equal"] for entry in report["equality"].values())
    assert all(entry["seconds per step"] > 0 for entry in report["step"].values())
    first = {round(entry["losses"][0], 1) for entry in report["step"].values()}
    assert len(first) == 1, "the ways to train begin with the same loss, but for rounding"
