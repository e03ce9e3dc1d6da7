"""The end of a multirun or of a sweep: what its jobs have come to, on the terminal and as a summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivl_lightning.launch.objective import Objective, choose_objective, read_scores
from ivl_lightning.launch.planned_jobs import JobResult
from ivl_lightning.reporting.job_table import JobRow, JobTable, print_job_table


def conclude(
    folder: Path, command: str, results: Sequence[JobResult], scores: Sequence[Mapping[str, float]] | None = None
) -> bool:
    """Print what the jobs have come to, and write the summary; whether none has failed.

    Args:
        folder: of all jobs.
        command: that made them, for people to make them again.
        results: of the jobs.
        scores: metric -> value, of each job; None reads the last validation of each.
    """
    # Imported late: the command must not wait for it to start.
    from ivl_lightning.reporting.job_summary import write_summary

    table = job_table(folder, command, results, scores)
    print_job_table(table)
    failed = [result for result in results if result.state == "failed"]
    for result in failed:
        print(f"error: {result.planned.name} failed with exit code {result.exit_code}", file=sys.stderr)
        print("".join(f"    {line}\n" for line in result.what_failed().splitlines()), end="", file=sys.stderr)
        print(f"    (its log is {result.log})", file=sys.stderr)
    print(f"summary: {write_summary(table)}")
    return not failed


def job_table(
    folder: Path, command: str, results: Sequence[JobResult], scores: Sequence[Mapping[str, float]] | None = None
) -> JobTable:
    """The jobs as the summary shows them."""
    if scores is None:
        scores = [read_scores(result.planned.configs) for result in results]
    settings = next(iter(results[0].planned.configs.values())).objective
    objective = choose_objective(settings, scores)
    rows = [_row(result, own, objective) for result, own in zip(results, scores, strict=True)]
    metric, goal = (None, "") if objective is None else (objective.metric, objective.goal)
    return JobTable(folder, command, metric, goal, rows)


def _row(result: JobResult, scores: Mapping[str, float], objective: Objective | None) -> JobRow:
    job = result.planned.job
    return JobRow(
        number=job.number,
        varied=dict(override.lstrip("+").split("=", 1) for override in job.overrides if "=" in override),
        state=result.state,
        exit_code=result.exit_code,
        score=None if objective is None else objective.of(scores),
        seconds=result.seconds,
        folder=Path(job.run_dir),
        error=result.what_failed() if result.state == "failed" else "",
    )
