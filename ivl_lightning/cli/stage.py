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
    from transformers.utils.logging import disable_progress_bar

    from ivl_lightning.data.storage import MachineError
    from ivl_lightning.launch.run_stage import run_stage

    _quiet()
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        run_stage(folder)
    except (ValueError, MachineError) as error:
        (folder / ERROR_NAME).write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(f"error: {error}\n(the traceback is in {folder / ERROR_NAME})")


def _quiet() -> None:
    """What the libraries say about themselves is of no use to the user of this command."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Frozen parts are in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")


if __name__ == "__main__":
    main()
