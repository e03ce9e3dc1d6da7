"""Internal: the process of one stage, `python -m ivl_lightning.cli.stage RUN/NAME`."""

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from ivl_lightning.launch.stage_process import end_with_parent

ERROR_NAME = "error.log"


def main() -> None:
    """Train; a user's mistake ends with its message, the traceback goes to a file."""
    end_with_parent()
    folder = Path(sys.argv[1])
    from transformers.utils.logging import disable_progress_bar

    from ivl_lightning.callbacks.preemption import PreemptedError
    from ivl_lightning.data.storage import MachineError
    from ivl_lightning.launch.run_stage import run_stage

    _quiet()
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        run_stage(folder)
    except PreemptedError as stop:
        if _rank() == "0":
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except (ValueError, MachineError) as error:
        path, where = (folder / ERROR_NAME, "") if _rank() == "0" else _of_other_rank(folder)
        path.write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(f"error{where}: {error}\n(the traceback is in {path})")


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _of_other_rank(folder: Path) -> tuple[Path, str]:
    """Where a rank behind the first writes, and how it is called."""
    path = folder / ERROR_NAME
    return path.with_stem(f"{path.stem}_rank{_rank()}"), f" on rank {_rank()}"


def _quiet() -> None:
    """What the libraries say about themselves is of no use to the user of this command."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Frozen parts are in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
    # The launching processes have seen to it (launch/ranks.py).
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")


if __name__ == "__main__":
    main()
