"""What `ivl-convert` and `ivl-export` share: arguments, messages, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from omegaconf import DictConfig

from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.config.convert import WriteConfig, check_write
from ivl_lightning.launch.compose import plain_values
from ivl_lightning.launch.overrides import forced

if TYPE_CHECKING:
    from ivl_lightning.conversion.parity import ParityReport

MISTAKE, DIFFERENT, INTERRUPTED = 2, 3, 130
Config = TypeVar("Config", bound=WriteConfig)


def start(command: Callable[[], None]) -> None:
    """Run a Hydra application whose settings may be misspelt: exit code 2 with a message."""
    try:
        sys.argv[1:] = forced(sys.argv[1:])
        command()
    except ConfigError as error:
        stop(error)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)


def finish(kind: type[Config], composed: DictConfig, write: Callable[[Config], ParityReport]) -> None:
    """Check the settings, write, and show the report; exit code 2 for a mistake, 3 where source and target differ.

    Args:
        kind: of the settings.
        composed: by Hydra.
        write: does the work.
    """
    try:
        config = load(kind, plain_values(composed))
        check_write(config)
    except ConfigError as error:
        stop(error)
    # Imported late: --help and wrong settings need no torch.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ivl_lightning.checkpoints.writer import DiskError
    from ivl_lightning.conversion.summary import print_report
    from ivl_lightning.conversion.write import ParityError

    disable_progress_bar()
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    try:
        report = write(config)
    except ParityError as error:
        print_report(error.report, stderr=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(DIFFERENT)
    except (ValueError, DiskError) as error:
        stop(error)
    print_report(report)
    print(f"written: {config.target}")


def stop(error: Exception) -> NoReturn:
    """End with a message."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(MISTAKE)
