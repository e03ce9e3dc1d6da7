"""`ivl-plan`: forecast memory, time and files of a run; takes the arguments of `train.py`. Nothing is made."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from ivl_lightning.config.check import load
from ivl_lightning.config.plan import PlanConfig, check_plan
from ivl_lightning.launch.command import stage_configs, take_arguments
from ivl_lightning.launch.dry_run import stand_ins
from ivl_lightning.launch.overrides import parse

NO_FIT = 1
_GROUP = "plan."
_STAND_IN_ROWS = 40
"""Rows of each kind that a stand-in for the miniature's tokenizer learns from; more teach it nothing new."""


def main() -> None:
    """The command: exit code 0, or 1 where a stage does not fit, and for a mistake, which is named."""
    own = [argument for argument in sys.argv[1:] if argument.startswith(_GROUP)]
    # The rest is composed for each stage, which knows no settings of the forecast.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in own]
    take_arguments()

    @hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="plan")
    def task(composed: DictConfig) -> None:
        try:
            fits = run(composed, own)
        except ValueError as error:
            sys.exit(f"error: {error}")
        if not fits:
            sys.exit(NO_FIT)

    task()


def run(composed: DictConfig, own: list[str]) -> bool:
    """Print the forecast of a composed run, and write it where that is asked for; whether every stage fits.

    Args:
        composed: by Hydra.
        own: `plan.NAME=VALUE`.

    Raises:
        ValueError: a wrong setting, model or meta file.
    """
    plan = read_plan(composed, own)
    OmegaConf.set_struct(composed, False)
    del composed["plan"]
    configs = stage_configs(composed, stand_ins(composed))
    # Imported late: --help and wrong settings need no torch.
    from ivl_lightning.launch.forecast import forecast_stages
    from ivl_lightning.launch.forecast_file import write_forecast
    from ivl_lightning.launch.forecast_lines import print_forecast

    stages = forecast_stages(configs, plan, stand_in=_miniature_vocabulary)
    print_forecast(stages, plan)
    if plan.json is not None:
        write_forecast(stages, plan, Path(plan.json).expanduser())
    return all(stage.forecast.fits for stage in stages.values())


def read_plan(composed: DictConfig, own: list[str]) -> PlanConfig:
    """The settings of the forecast, checked.

    Raises:
        ConfigError: names every misspelt or wrong one.
    """
    values = OmegaConf.to_container(composed.plan)
    assert isinstance(values, dict)
    given = {override.key_or_group.removeprefix(_GROUP): override.value() for override in parse(own)}
    merged: dict[str, Any] = {**{str(key): value for key, value in values.items()}, **given}
    # 3 is a number as good as 3.0 on a command line.
    whole = {name for name, default in values.items() if isinstance(default, float)}
    plan = load(
        PlanConfig,
        {name: float(value) if name in whole and isinstance(value, int) else value for name, value in merged.items()},
    )
    check_plan(plan)
    return plan


def _miniature_vocabulary() -> int:
    """Tokens of the tokenizer that the miniature makes with its data."""
    from ivl_lightning.miniature.prepare import prepare
    from ivl_lightning.models.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        prepare(folder, rows=_STAND_IN_ROWS, val_rows=1)
        return len(load_tokenizer(Path(folder) / "tokenizer"))


if __name__ == "__main__":
    main()
