"""Another try for media that fail once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ivl_lightning.data.locations import MediaError

Result = TypeVar("Result")


def with_retries(read: Callable[[], Result], retries: int, *, pause: float = 0.0) -> Result:
    """A medium on a network may fail once; what fails every time is the row's fault.

    Args:
        read: opens media.
        retries: further tries of what could not be opened or fetched.
        pause: seconds before the second try; each further pause is four times as long.

    Raises:
        MediaError: of the last try.
    """
    for number in range(retries):
        try:
            return read()
        except MediaError as error:
            # A file that is there and is no picture will be none in a second either.
            if error.reason != "file_unreadable":
                raise
            time.sleep(pause * 4**number)
    return read()
