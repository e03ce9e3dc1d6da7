"""Files and folders of a resolved location, on this machine or behind fsspec."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

import fsspec  # type: ignore[import-untyped]  # it ships no hints

from ivl_lightning.data.locations import url_scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

Access = Literal["head", "index", "whole"]
"""What of a file will be read: its first bytes, parts here and there, or all from front to back."""

_CACHES: dict[Access, tuple[str, int]] = {
    "head": ("readahead", 1 << 16),
    "index": ("blockcache", 1 << 18),
    "whole": ("readahead", 1 << 22),
}
"""fsspec's cache and how many bytes of a remote file it fetches at a time. Most pictures' heads fit in 64 KiB, nearly
all pictures in 4 MiB: then a file costs one request for its size and one for its bytes."""

_COPY_BLOCK = 1 << 22

_COPY_IN_MEMORY = 1 << 26

_PACKAGES = {"s3": "'ivl-lightning[s3]'", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}

_FILE_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".webp")


class MissingPackageError(ValueError):
    """A package that this environment lacks; nothing is wrong with the data."""


def open_location(location: str, access: Access) -> BinaryIO:
    """Open a file for reading.

    A remote file is fetched in blocks, as far as it is read. Credentials, endpoints and retries of a store are those
    of fsspec's own configuration (files in `~/.config/fsspec`, variables such as `FSSPEC_S3_ENDPOINT_URL`).

    Args:
        location: as `resolve_location` gave it.
        access: what will be read; any other reading works too and takes more requests.

    Raises:
        OSError, and what the store's client raises: the file cannot be opened.
        ValueError: a package for the scheme is missing.
    """
    scheme = url_scheme(location)
    if scheme is not None:
        cache, block = _CACHES[access]
        return cast(BinaryIO, _store(scheme).open(location, "rb", block_size=block, cache_type=cache))
    path = Path(location)
    # Opening a named pipe would wait forever for a writer.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path.open("rb")


@contextmanager
def open_for_passes(location: str) -> Iterator[BinaryIO]:
    """Open a file that will be read whole and more than once; a remote one is fetched first.

    Args:
        location: as `resolve_location` gave it.

    Raises:
        OSError, ValueError: as `open_location`.
    """
    with open_location(location, "whole") as file:
        if url_scheme(location) is None:
            yield file
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with BytesIO() if size <= _COPY_IN_MEMORY else TemporaryFile() as copy:
            shutil.copyfileobj(file, copy, _COPY_BLOCK)
            yield cast(BinaryIO, copy)


def is_folder(location: str) -> bool:
    """Whether a folder is there.

    Args:
        location: as `resolve_location` gave it.

    Raises:
        OSError, ValueError: as `open_location`.
    """
    scheme = url_scheme(location)
    if scheme is None:
        return Path(location).is_dir()
    # A store has to be asked, so a name that tells is believed.
    return PurePosixPath(location).suffix.lower() not in _FILE_SUFFIXES and bool(_store(scheme).isdir(location))


def folder_names(location: str) -> list[str]:
    """Names of the files in a folder, not of those in folders below it; in any order.

    Args:
        location: as `resolve_location` gave it.

    Raises:
        OSError, ValueError: as `open_location`.
    """
    scheme = url_scheme(location)
    if scheme is None:
        return [entry.name for entry in Path(location).iterdir()]
    return [
        PurePosixPath(entry["name"]).name
        for entry in _store(scheme).ls(location, detail=True)
        if entry["type"] == "file"
    ]


def _store(scheme: str) -> Any:
    # Asked for anew at each use: fsspec keeps the instance, and gives a forked worker one of its own. An instance that
    # was held over a fork would wait for a thread that exists in the parent only.
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        # No MediaError: it would set aside every row, as if the files were at fault.
        package = _PACKAGES.get(scheme)
        how = f"pip install {package}" if package else "see fsspec's list of known implementations"
        raise MissingPackageError(f"reading {scheme}:// needs a package that is missing ({error}): {how}") from error
