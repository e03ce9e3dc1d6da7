"""Internal: the process of one stage, `python -m ivl_lightning.cli.stage RUN/NAME`."""

import logging
import sys
import traceback
import warnings
from pathlib import Path

ERROR_NAME = "error.log"


def main() -> None:
    """Train; a user's mistake ends with its message, the traceback goes to a file."""
    folder = Path(sys.argv[1])
    _quiet()
    from ivl_lightning.launch.run_stage import run_stage

    try:
        run_stage(folder)
    except ValueError as error:
        (folder / ERROR_NAME).write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(f"error: {error}\n(the traceback is in {folder / ERROR_NAME})")


def _quiet() -> None:
    """Lightning's notes on devices and its own deprecations say nothing to the user of this command."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")


if __name__ == "__main__":
    main()
