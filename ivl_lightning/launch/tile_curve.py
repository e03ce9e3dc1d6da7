"""Score and cost over the tile limit, behind a stage's last validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from rich import print as rich_print

from ivl_lightning.constants import TILE_CURVE_NAME
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.stages.answer_scores import SCORE
from ivl_lightning.stages.base import Stage
from ivl_lightning.whole_files import write_whole


def trace_tile_curve(
    trainer: L.Trainer, stage: Stage, datamodule: DynamicPackingDataModule, folder: Path
) -> list[dict[str, Any]]:
    """Answer the rows of validation at each tile limit, and write `tile_curve.json`; every rank must call it.

    Args:
        trainer: of the stage; its metrics are those of the curve afterwards.
        stage: trained.
        datamodule: knows the limits.
        folder: of the stage.

    Returns:
        A point per limit, rising; none where no row is answered, or none fits at every limit.
    """
    if datamodule.answered_rows:
        trainer.test(stage, datamodule, verbose=False)
    points = [_point(limit, scores, stage, datamodule) for limit, scores in stage.tile_scores.items()]
    if trainer.is_global_zero:
        if len(datamodule.rows_at_limits) < max(len(datamodule.answered_rows), 1):
            rich_print(_left_out(datamodule))
        write_whole(folder / TILE_CURVE_NAME, json.dumps(points, indent=1, ensure_ascii=False))
    return points


def _point(limit: int, scores: dict[str, float], stage: Stage, datamodule: DynamicPackingDataModule) -> dict[str, Any]:
    metrics = {spec.name: stage.metric_of(spec) for spec in datamodule.datasets_at_limits}
    return {
        "max_tiles": limit,
        "score": scores[SCORE],
        "by_dataset": {dataset: scores[f"{metric}/{dataset}"] for dataset, metric in metrics.items()},
        "metrics": metrics,
        "rows": len(datamodule.rows_at_limits),
        "left_out": datamodule.left_out_at_limits,
        **{name: scores[name] for name in ("prompt_tokens", "tiles", "answer_tokens", "repeats", "cut_off")},
    }


def _left_out(datamodule: DynamicPackingDataModule) -> str:
    if not datamodule.answered_rows:
        return "[yellow]no tile curve[/yellow]: eval.max_tiles is given, but validation answers no rows of this stage"
    reasons = ", ".join(f"{count} {reason}" for reason, count in datamodule.left_out_at_limits.items())
    return (
        f"[yellow]tile curve over {len(datamodule.rows_at_limits)} of {len(datamodule.answered_rows)} rows[/yellow]: "
        f"the others do not fit at every limit of eval.max_tiles ({reasons}); lower the largest, or raise "
        "data.max_tokens and data.max_pack_tiles"
    )
