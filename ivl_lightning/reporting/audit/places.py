"""Whether the results can be written; imports nothing heavy, since it is asked before anything else."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from ivl_lightning.config.check import ConfigError

ERROR_NAME = "error.log"


def checked_places(output: str, drop: str | None) -> Path:
    """The folder of the results. That it takes files is better known now than after hours of work.

    The log of an earlier audit is removed there: it would be taken for this one's.

    Args:
        output: folder of the results.
        drop: exclusion list to write; None for none.

    Raises:
        ConfigError: one of them cannot be written.
    """
    log = Path(output).expanduser() / ERROR_NAME
    for name, place, path in (("output", output, log), ("drop", drop, Path(drop or "").expanduser())):
        if place is None:
            continue
        try:
            probe(path)
        except OSError as error:
            raise ConfigError(f"{name}={place} cannot be written ({error.strerror}): give another place") from error
    log.unlink(missing_ok=True)
    return log.parent


def probe(path: Path) -> None:
    """Make sure that a file can be written, long before there is anything to write.

    Args:
        path: of the file; its folder is made.

    Raises:
        OSError: it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    with tempfile.TemporaryFile(dir=path.parent):
        pass
