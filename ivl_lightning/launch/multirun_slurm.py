"""The jobs of a multirun as jobs of Slurm: submitted, waited for, and found again by the same command."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.job_progress import JobProgress
from ivl_lightning.launch.planned_jobs import JobResult, PlannedJob, ended, stage_seconds
from ivl_lightning.launch.signals import JobsStoppedError, StopRequestedError
from ivl_lightning.launch.slurm import job_fields, log_of, submit

_RECORD_NAME = "slurm_job.json"
_LOOK_SECONDS, _TROUBLE_SECONDS = 5.0, 60.0


def run_on_slurm(planned: Sequence[PlannedJob], progress: JobProgress, keep: Callable[[JobResult], None]) -> None:
    """Submit jobs and wait for them; those that an earlier start of this command has submitted are waited for only.

    Args:
        planned: the jobs.
        progress: shows them.
        keep: takes the result of each that has ended.

    Raises:
        ConfigError: there is no way to submit, or a job with other settings is still there.
        JobsStoppedError: a signal has ended the waiting; the jobs go on.
    """
    active = active_jobs()
    left: list[tuple[PlannedJob, str]] = []
    for one in planned:
        left.append((one, _job_of(one, active)))
        progress.started(one, f" (Slurm job {left[-1][1]})")
    try:
        while left:
            active = _look(progress)
            for one, job in [entry for entry in left if entry[1] not in active]:
                left.remove((one, job))
                result = _result(one, job)
                progress.ended(result)
                keep(result)
            progress.look(one for one, job in left if active[job] == "RUNNING")
            if left:
                time.sleep(_LOOK_SECONDS)
    except StopRequestedError as stop:
        for one, job in left:
            keep(JobResult(one, "running", log=log_of(one.launcher, one.job.run_dir, job)))
        jobs = " ".join(job for _, job in left)
        raise JobsStoppedError(
            f"Slurm jobs go on without this command, which waits for them again if it is started again; to stop them: "
            f"scancel {jobs}"
        ) from stop


def _look(progress: JobProgress) -> dict[str, str]:
    """The active jobs, as soon as Slurm answers: its controller may be restarted while jobs run."""
    while True:
        try:
            return active_jobs()
        except ConfigError as error:
            progress.told(f"{error}; asked again in {_TROUBLE_SECONDS:.0f} s")
            time.sleep(_TROUBLE_SECONDS)


def active_jobs() -> dict[str, str]:
    """Own jobs that wait or run: id -> state.

    Raises:
        ConfigError: there is no Slurm here, or it does not answer.
    """
    command = ["squeue", "--me", "--noheader", "--format=%A %T"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(
            "launcher=slurm finds no squeue here: start the command on a machine that submits jobs"
        ) from None
    if listed.returncode:
        raise ConfigError(f"squeue does not list the jobs: {listed.stderr.strip()}")
    return dict(line.split() for line in listed.stdout.splitlines())


def _job_of(planned: PlannedJob, active: dict[str, str]) -> str:
    """Id of the job that does it: the one submitted before, or a new one."""
    record = Path(planned.job.run_dir) / _RECORD_NAME
    arguments = list(planned.job.arguments)
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before["id"] in active:
            if before["arguments"] != arguments:
                raise ConfigError(
                    f"Slurm job {before['id']} still works in {planned.job.run_dir}, with other arguments: "
                    f"{' '.join(before['arguments'])}. Wait for it, scancel it, or use another run_dir"
                )
            return str(before["id"])
    run = Path(planned.job.run_dir)
    job = submit(planned.launcher, arguments, planned.job.run_dir, name=f"{run.parent.name}-{run.name}")
    record.write_text(json.dumps({"id": job, "arguments": arguments}, indent=2), encoding="utf-8")
    return job


def _result(planned: PlannedJob, job: str) -> JobResult:
    log = log_of(planned.launcher, planned.job.run_dir, job)
    fields = job_fields(job)
    if fields:
        return ended(planned, _exit_code(fields), _run_seconds(fields["RunTime"]), log)
    # Slurm has forgotten it: what it has left speaks for it.
    seconds = stage_seconds(planned.chains)
    return ended(planned, 1, float("nan"), log) if seconds is None else ended(planned, 0, seconds, log)


def _exit_code(fields: dict[str, str]) -> int:
    if fields["JobState"] == "COMPLETED":
        return 0
    code, signal = map(int, fields["ExitCode"].split(":"))
    # A job that was canceled or ran out of time may bear neither.
    return code or -signal or 1


def _run_seconds(text: str) -> float:
    """Of `DAYS-HOURS:MINUTES:SECONDS`."""
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    assert parts is not None, f"RunTime={text}"
    days, hours, minutes, seconds = parts.groups(default="0")
    return float(((int(days) * 24 + int(hours)) * 60 + int(minutes)) * 60 + int(seconds))
