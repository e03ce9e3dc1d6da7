"""The report of a run: one page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivl_lightning.environment import environment, now
from ivl_lightning.reporting.again import how_to_make
from ivl_lightning.reporting.family import family
from ivl_lightning.reporting.headline import headline, title
from ivl_lightning.reporting.left_out import left_out
from ivl_lightning.reporting.pages import render_page
from ivl_lightning.reporting.probe import probe_table
from ivl_lightning.reporting.run_folder import Run, StageFolder, read_run
from ivl_lightning.reporting.scaling import Row, compare
from ivl_lightning.reporting.scaling_text import scaling_cells, scaling_columns, scaling_headline, scaling_sentences
from ivl_lightning.reporting.scores import (
    DATASET_COLUMNS,
    PACKING_COLUMNS,
    dataset_names,
    dataset_rows,
    mean_rows,
    metrics_used,
    other_rows,
    packing_rows,
    score_rows,
)
from ivl_lightning.reporting.table import COLUMNS, NONE, stage_cells

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
    compared = compare(run)
    return render_page(
        _TEMPLATE,
        title=title(run),
        headline=[*headline(run.stages), *scaling_headline(compared)],
        stages=run.stages,
        stage_columns=COLUMNS,
        stage_rows=_stage_rows(run.stages),
        left_out=[left_out(stage) for stage in run.stages],
        probe=probe_table(run.stages),
        again=how_to_make(run),
        written={"written": now(), **environment()},
        missing=NONE,
        **_scores(run.stages),
        **_training(run.stages),
        **_scaling(run, compared),
    )


def _stage_rows(stages: Sequence[StageFolder]) -> list[tuple[bool, tuple[str, ...]]]:
    """Whether each stage is finished, and its texts."""
    return [(stage.finished, stage_cells(stage.summary)) for stage in stages]


def _scores(stages: Sequence[StageFolder]) -> dict[str, Any]:
    # Imported late, here and below: matplotlib takes its time, and only drawing needs it.
    from ivl_lightning.reporting.preferences import SOURCE_COLUMNS, preference_figure, source_rows
    from ivl_lightning.reporting.score_figures import score_figure, tile_figure

    return {
        "score_figure": score_figure(stages),
        "score_rows": score_rows(stages),
        "mean_rows": mean_rows(stages),
        "other_rows": other_rows(stages),
        "metrics_used": metrics_used(stages),
        "tile_figure": tile_figure(stages),
        "preference_figure": preference_figure(stages),
        "source_columns": SOURCE_COLUMNS,
        "source_rows": source_rows(stages),
    }


def _training(stages: Sequence[StageFolder]) -> dict[str, Any]:
    from ivl_lightning.reporting.figures import MOST_LINES
    from ivl_lightning.reporting.loss_figures import dataset_loss_figure, loss_figure
    from ivl_lightning.reporting.training_figures import optimizer_figure, speed_figure

    return {
        "loss_figure": loss_figure(stages),
        "optimizer_figure": optimizer_figure(stages),
        "speed_figure": speed_figure(stages),
        "dataset_figure": dataset_loss_figure(stages),
        "hidden_datasets": max(len(dataset_names(stages)) - MOST_LINES, 0),
        "dataset_columns": DATASET_COLUMNS,
        "dataset_rows": dataset_rows(stages),
        "packing_columns": PACKING_COLUMNS,
        "packing_rows": packing_rows(stages),
    }


def _scaling(run: Run, compared: Sequence[Row]) -> dict[str, Any]:
    from ivl_lightning.reporting.loss_figures import loss_figure
    from ivl_lightning.reporting.scaling_figure import scaling_figure

    return {
        "scaling_figure": scaling_figure(compared),
        "scaling_columns": scaling_columns(compared),
        "scaling_rows": scaling_cells(compared, run.folder),
        "scaling_sentences": scaling_sentences(compared),
        "family_figure": _family_figure(run, compared),
        "sequels": [(sequel.name, _stage_rows(sequel.stages), loss_figure(sequel.stages)) for sequel in run.sequels],
    }


def _family_figure(run: Run, compared: Sequence[Row]) -> str | None:
    """The family tree in the colors of the comparison; None where no stage has a lineage."""
    from ivl_lightning.reporting.family_figure import family_figure
    from ivl_lightning.reporting.scaling_figure import sequel_colors

    known = family(run)
    colors = {row.curve.name: color for row, color in zip(compared, sequel_colors(compared), strict=True)}
    return family_figure(known, colors) if known else None
