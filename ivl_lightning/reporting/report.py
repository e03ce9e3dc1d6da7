"""The report of a run: one page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ivl_lightning.reporting.cards import card_decks
from ivl_lightning.reporting.environment import environment
from ivl_lightning.reporting.family import family
from ivl_lightning.reporting.left_out import left_out
from ivl_lightning.reporting.run_folder import Run, StageFolder, read_run
from ivl_lightning.reporting.scaling import Row, compare
from ivl_lightning.reporting.scaling_text import scaling_cells, scaling_columns, scaling_headline, scaling_sentences
from ivl_lightning.reporting.scores import (
    DATASET_COLUMNS,
    PACKING_COLUMNS,
    dataset_rows,
    packing_rows,
    score_kinds,
    score_rows,
)
from ivl_lightning.reporting.table import (
    COLUMNS,
    MEAN_SCORE,
    NONE,
    REWARD_ACCURACY,
    duration,
    percent,
    stage_cells,
)

REPORT_NAME = "report.html"
_TEMPLATE = "report.html.jinja"


def write_report(run_dir: str) -> Path:
    """Write RUN/report.html from what lies in the run folder.

    Args:
        run_dir: the run folder; stages that are missing or not finished are said to be so.

    Returns:
        The page.
    """
    run = read_run(Path(run_dir))
    page = run.folder / REPORT_NAME
    page.write_text(render(run), encoding="utf-8")
    return page


def render(run: Run) -> str:
    """The page as text."""
    # Imported late: matplotlib takes its time, and only drawing needs it.
    from ivl_lightning.reporting.figures import dataset_loss_figure, loss_figure, score_figure
    from ivl_lightning.reporting.preferences import SOURCE_COLUMNS, preference_figure, source_rows
    from ivl_lightning.reporting.scaling_figure import scaling_figure

    template = files("ivl_lightning.reporting").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    pages = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    stages, compared = run.stages, compare(run)
    return pages.from_string(template).render(
        title=_title(run),
        headline=[*_headline(stages), *scaling_headline(compared)],
        stages=stages,
        stage_columns=COLUMNS,
        stage_rows=_stage_rows(stages),
        scaling_figure=scaling_figure(compared),
        scaling_columns=scaling_columns(compared),
        scaling_rows=scaling_cells(compared, run.folder),
        scaling_sentences=scaling_sentences(compared),
        family_figure=_family_figure(run, compared),
        sequels=[(sequel.name, _stage_rows(sequel.stages), loss_figure(sequel.stages)) for sequel in run.sequels],
        loss_figure=loss_figure(stages),
        score_figure=score_figure(stages),
        score_rows=score_rows(stages) if score_kinds(stages) else [],
        preference_figure=preference_figure(stages),
        source_columns=SOURCE_COLUMNS,
        source_rows=source_rows(stages),
        dataset_figure=dataset_loss_figure(stages),
        dataset_columns=DATASET_COLUMNS,
        dataset_rows=dataset_rows(stages),
        packing_columns=PACKING_COLUMNS,
        packing_rows=packing_rows(stages),
        decks=card_decks(stages),
        left_out=[left_out(stage) for stage in stages],
        environment=environment(),
        command=run.command,
        missing=NONE,
    )


def _stage_rows(stages: Sequence[StageFolder]) -> list[tuple[bool, tuple[str, ...]]]:
    """Whether each stage is finished, and its texts."""
    return [(stage.finished, stage_cells(stage.summary)) for stage in stages]


def _family_figure(run: Run, compared: Sequence[Row]) -> str | None:
    """The family tree in the colors of the comparison; None where no stage has a lineage."""
    from ivl_lightning.reporting.family_figure import family_figure
    from ivl_lightning.reporting.scaling_figure import sequel_colors

    known = family(run)
    colors = {row.curve.name: color for row, color in zip(compared, sequel_colors(compared), strict=True)}
    return family_figure(known, colors) if known else None


def _title(run: Run) -> dict[str, str]:
    """Run, recipe and model; the last stage speaks for the chain."""
    config: dict[str, Any] = run.stages[-1].config if run.stages else {}
    return {
        "run": run.name,
        "recipe": config.get("recipe", {}).get("name", NONE),
        "model": config.get("model", {}).get("name", NONE),
    }


def _headline(stages: Sequence[StageFolder]) -> list[tuple[str, str]]:
    """The numbers a reader wants first, each with what it is."""
    finished = [stage.summary for stage in stages if stage.finished]
    if not finished:
        return [(f"0 of {len(stages)}", "stages finished")]
    rewarded = [summary for summary in finished if REWARD_ACCURACY in summary.scores]
    return [
        (percent(finished[-1].scores.get(MEAN_SCORE)), f"exact match after {finished[-1].stage}"),
        *(
            (percent(summary.scores[REWARD_ACCURACY]), f"reward accuracy after {summary.stage}")
            for summary in rewarded[-1:]
        ),
        (f"{len(finished)} of {len(stages)}", "stages finished"),
        (f"{sum(summary.steps for summary in finished):,}", "optimizer steps"),
        (duration(sum(summary.seconds for summary in finished)), "wall time"),
    ]
