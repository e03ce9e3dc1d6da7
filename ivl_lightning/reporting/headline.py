"""What a reader of a report wants to know first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ivl_lightning.reporting.run_folder import Run, StageFolder
from ivl_lightning.reporting.table import NONE, REWARD_ACCURACY, duration, mean_score, percent


def title(run: Run) -> dict[str, str]:
    """Run, recipe and model; the last stage speaks for the chain."""
    config: dict[str, Any] = run.stages[-1].config if run.stages else {}
    return {
        "run": run.name,
        "recipe": config.get("recipe", {}).get("name", NONE),
        "model": config.get("model", {}).get("name", NONE),
    }


def headline(stages: Sequence[StageFolder]) -> list[tuple[str, str]]:
    """The numbers of the chain, each with what it is."""
    finished = [stage.summary for stage in stages if stage.finished]
    if not finished:
        return [(f"0 of {len(stages)}", "stages finished")]
    rewarded = [summary for summary in finished if REWARD_ACCURACY in summary.scores]
    return [
        (percent(mean_score(finished[-1].scores)), f"score after {finished[-1].stage}"),
        *(
            (percent(summary.scores[REWARD_ACCURACY]), f"reward accuracy after {summary.stage}")
            for summary in rewarded[-1:]
        ),
        (f"{len(finished)} of {len(stages)}", "stages finished"),
        (f"{sum(summary.steps for summary in finished):,}", "optimizer steps"),
        (duration(sum(summary.seconds for summary in finished)), "wall time"),
    ]
