"""Settings of a search on this machine, `ivl-sweep`."""

from __future__ import annotations

from dataclasses import dataclass

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import Strict


@dataclass(kw_only=True)
class SweepConfig(Strict):
    """What `ivl-sweep` takes beside the arguments of `train.py`; `seed` is that of the search too.

    Attributes:
        sweep: one of `conf/sweep` by its name, or a file that describes a sweep as W&B does.
        count: most runs, those of an earlier start included; null takes the file's `run_cap`, for a grid all points.
    """

    sweep: str
    count: int | None = None


def check_sweep(settings: SweepConfig) -> None:
    """Check the numbers.

    Raises:
        ConfigError: one is out of range.
    """
    if settings.count is not None and settings.count < 1:
        raise ConfigError(f"count={settings.count} must be at least 1")
