"""`launcher=slurm`: the very command as a job of Slurm, through submitit; and a job that goes back to the queue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import LauncherConfig
from ivl_lightning.launch.ranks import Ranks
from ivl_lightning.launch.signals import REQUEUE_SIGNAL

if TYPE_CHECKING:
    import submitit

_WAIT_SECONDS = 60


def submit_command(launcher: LauncherConfig, arguments: Sequence[str], ranks: Ranks, run_dir: str) -> None:
    """Submit this command, its settings checked as for a run here, and say where it is to be seen.

    Args:
        launcher: settings of the job.
        arguments: of `train.py` in the job.
        ranks: that this command was started as.
        run_dir: folder of the run.

    Raises:
        ConfigError: it runs as a job already, or there is no way to submit.
    """
    if ranks.starter != "alone":
        raise ConfigError(
            f"launcher=slurm submits a job, but {ranks.starter} has started {ranks.world_size} processes already: "
            "leave one of the two out"
        )
    job = submit(launcher, arguments, run_dir, name=Path(run_dir).name)
    print(_where(launcher, log_folder(launcher, run_dir), job))


def submit(launcher: LauncherConfig, arguments: Sequence[str], run_dir: str, *, name: str) -> str:
    """Submit `train.py` with these arguments; the id of the job.

    Args:
        launcher: settings of the job.
        arguments: of `train.py` in the job.
        run_dir: folder of the run.
        name: of the job, for people.

    Raises:
        ConfigError: there is no way to submit.
    """
    return _submit(_executor(launcher, log_folder(launcher, run_dir), name), list(arguments))


def log_folder(launcher: LauncherConfig, run_dir: str) -> Path:
    """Where the job's script and logs go."""
    return Path(launcher.folder or f"{run_dir}/slurm")


def log_of(launcher: LauncherConfig, run_dir: str, job: str) -> Path:
    """Where rank 0 of a job writes."""
    return log_folder(launcher, run_dir) / f"{job}_0_log.out"


def _executor(launcher: LauncherConfig, folder: Path, name: str) -> submitit.SlurmExecutor:
    try:
        import submitit
    except ImportError:
        raise ConfigError("launcher=slurm needs submitit: pip install 'ivl-lightning[slurm]'") from None
    if shutil.which("sbatch") is None:
        raise ConfigError("launcher=slurm finds no sbatch here: start the command on a machine that submits jobs")
    executor = submitit.SlurmExecutor(folder=folder)
    executor.update_parameters(**_parameters(launcher, name))
    return executor


def _parameters(launcher: LauncherConfig, name: str) -> dict[str, Any]:
    """What submitit writes into the job's script."""
    given: dict[str, Any] = {
        "job_name": name,
        "nodes": launcher.nodes,
        "ntasks_per_node": launcher.tasks_per_node,
        "gpus_per_node": launcher.gpus_per_node or None,
        "cpus_per_task": launcher.cpus_per_task,
        "time": launcher.time_minutes,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
    }
    # In the place of submitit's own signal, for which it would stop without an exact checkpoint.
    signal = f"{REQUEUE_SIGNAL.name.removeprefix('SIG')}@{launcher.signal_seconds}"
    own = {"signal": signal, "requeue" if launcher.requeue else "no-requeue": True}
    return {
        **{key: value for key, value in given.items() if value is not None},
        "setup": launcher.setup,
        "stderr_to_stdout": True,
        # Launching processes end together by themselves: the first must not make srun kill the others for its exit
        # code, but one that is gone must not leave them waiting for ever.
        "srun_args": ["--kill-on-bad-exit=0", f"--wait={_WAIT_SECONDS}"],
        "additional_parameters": own | launcher.options,
    }


def _submit(executor: submitit.SlurmExecutor, arguments: list[str]) -> str:
    """Id of the job."""
    from submitit.core.utils import FailedJobError

    try:
        return str(executor.submit(become_train, arguments).job_id)
    except FailedJobError as error:
        raise ConfigError(f"Slurm does not take the job: {error}") from error


def become_train(arguments: list[str]) -> None:
    """In the job: let `train.py` take the place of submitit's process, whose signal handlers end with it.

    They would requeue the job without a checkpoint, or not at all.
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "ivl_lightning.cli.train", *arguments])


def _where(launcher: LauncherConfig, folder: Path, job: str) -> str:
    gpus = f" and {launcher.gpus_per_node} GPUs" if launcher.gpus_per_node else ""
    return "\n".join(
        (
            f"job {job}: {launcher.nodes} nodes with {launcher.tasks_per_node} processes{gpus} each, "
            f"{launcher.time_minutes} minutes",
            f"  rank 0 writes     {folder}/{job}_0_log.out (the others {job}_RANK_log.out)",
            f"  follow            tail -F {folder}/{job}_0_log.out",
            f"  state             squeue --job={job}",
            f"  save and requeue  scancel --signal={REQUEUE_SIGNAL.name.removeprefix('SIG')} {job}",
            f"  save and stop     scancel --signal=TERM {job}",
            f"  cancel            scancel {job}",
        )
    )


def requeue(environment: Mapping[str, str]) -> str | None:
    """Put this process's job back into the queue; Slurm then ends what is left of it.

    Returns:
        What became of it, for people; None outside of a job.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if job_fields(job).get("Requeue") == "0":
        return f"job {job} may not be requeued (--no-requeue): submit the same command again to go on"
    done = _scontrol("requeue", job)
    if done.returncode:
        return f"job {job} could not be requeued, submit the same command again to go on: {done.stderr.strip()}"
    return f"job {job} is requeued"


def job_fields(job: str) -> dict[str, str]:
    """What Slurm says of a job, name -> value; empty where it does not know it, which is soon after its end."""
    return dict(re.findall(r"(\w+)=(\S*)", _scontrol("show", "job", "--oneliner", job).stdout))


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 127, "", "there is no scontrol here")
