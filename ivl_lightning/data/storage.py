"""Files and folders of a resolved location, on this machine or behind fsspec."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

import fsspec  # type: ignore[import-untyped]  # it ships no hints
from fsspec.dircache import DirCache  # type: ignore[import-untyped]  # nor here

from ivl_lightning.data.locations import shown, url_scheme

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


_LISTINGS = 1000
"""How many listings of folders a store's client may keep."""

_LISTING_SECONDS = 60

_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"listings_expiry_time": _LISTING_SECONDS},
    "s3a": {"listings_expiry_time": _LISTING_SECONDS},
    # gcsfs has a name of its own for it. Clients of HTTP keep listings, but do not look at them again.
    "gs": {"cache_timeout": _LISTING_SECONDS},
    "gcs": {"cache_timeout": _LISTING_SECONDS},
}

_MACHINE_FAULTS = {
    errno.EMFILE: "this process has too many open files; raise `ulimit -n`, or lower data.num_workers",
    errno.ENFILE: "this machine has too many open files; raise its limit (sysctl fs.file-max), or end other programs",
    errno.ENOMEM: "there is no memory left; lower data.num_workers or data.max_pixels, or give the job more memory",
    errno.ENOSPC: "the disk is full; free space, also in the folder for temporary files (TMPDIR)",
    errno.EDQUOT: "the disk quota is used up; free space, also in the folder for temporary files (TMPDIR)",
}


class MissingPackageError(ValueError):
    """A package that this environment lacks; nothing is wrong with the data."""


class MachineError(OSError):
    """This machine ran out of something; nothing is wrong with the data."""


class RedirectError(OSError):
    """A web server named another address instead of sending the file."""


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it: clients wrap what they met.

    Args:
        error: as it was caught.

    Yields:
        The error first.
    """
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def machine_fault(error: BaseException, path: str) -> MachineError | None:
    """What to raise where the machine, and not a file, is at fault; None for other errors.

    Memory that FFmpeg could not get counts as a fault of the file: it says so for broken lengths as well.

    Args:
        error: as it was caught.
        path: what was read, for the message.
    """
    for link in chain_of(error):
        number = _fault_number(link)
        if number in _MACHINE_FAULTS:
            told = f"{shown(path)} could not be read, and is not at fault: {_MACHINE_FAULTS[number]}"
            return MachineError(f"{told} ({type(link).__name__}: {link})")
    return None


def _fault_number(error: BaseException) -> int | None:
    if type(error).__module__.partition(".")[0] == "av":
        return error.errno if isinstance(error, OSError) and error.errno != errno.ENOMEM else None
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return error.errno if isinstance(error, OSError) else None


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


def file_identity(file: BinaryIO) -> tuple[int, ...] | None:
    """What tells an unchanged file of this machine from others: place on its disk, size and time of change.

    Args:
        file: as `open_location` gave it; None for one that was fetched.
    """
    if not isinstance(file, BufferedReader):
        return None
    state = os.fstat(file.fileno())
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


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
    store = _store_class(scheme)(**_options(scheme))
    # Neither time nor fsspec's `max_paths` ever empties it: what is old stays until it is asked for.
    listings = getattr(store, "dircache", None)
    if isinstance(listings, DirCache) and len(listings) > _LISTINGS:
        store.dircache = DirCache(listings.use_listings_cache, listings.listings_expiry_time)
    return store


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return _OPTIONS.get(scheme, {})
    # What is given here takes the place of the user's own settings for the client, so they are given again.
    own: dict[str, Any] = {}
    for name in ("http", "https"):
        own |= fsspec.config.conf.get(name, {}).get("client_kwargs", {})
    return {"allow_redirects": False, "client_kwargs": {**own, "raise_for_status": _refuse_redirect}}


async def _refuse_redirect(response: Any) -> None:
    """What aiohttp calls for each answer. Other failures are fsspec's to tell, which knows them."""
    if 300 <= response.status < 400:
        raise RedirectError(f"{response.url} leads on to {response.headers.get('Location', 'an unnamed address')}")


def _store_class(scheme: str) -> Any:
    try:
        return fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise MissingPackageError(
            f"data.allowed_schemes has {scheme!r}, which fsspec does not know ({error}); correct the name, or install "
            "the package that brings it"
        ) from error
    except ImportError as error:
        # No MediaError: it would set aside every row, as if the files were at fault.
        package = _PACKAGES.get(scheme)
        how = f"pip install {package}" if package else "see fsspec's list of known implementations"
        raise MissingPackageError(f"reading {scheme}:// needs a package that is missing ({error}): {how}") from error
