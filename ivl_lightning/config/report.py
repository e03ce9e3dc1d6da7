"""Settings of `ivl-report`."""

from __future__ import annotations

from dataclasses import dataclass

from ivl_lightning.config.schema import Strict


@dataclass(kw_only=True)
class ReportConfig(Strict):
    """`ivl-report`.

    Attributes:
        run_dir: folder of a run, finished or not, or of a multirun.
    """

    run_dir: str
