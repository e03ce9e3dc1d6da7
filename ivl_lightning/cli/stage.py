"""Internal: the process of one stage, `python -m ivl_lightning.cli.stage RUN/NAME`."""

import sys
import traceback
from pathlib import Path

ERROR_NAME = "error.log"


def main() -> None:
    """Train; a user's mistake ends with its message, the traceback goes to a file."""
    folder = Path(sys.argv[1])
    from ivl_lightning.launch.run_stage import run_stage

    try:
        run_stage(folder)
    except ValueError as error:
        (folder / ERROR_NAME).write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(f"error: {error}\n(the traceback is in {folder / ERROR_NAME})")


if __name__ == "__main__":
    main()
