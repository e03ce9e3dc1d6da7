"""Where a row's media path leads: inside its root, or nowhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from ivl_lightning.structures import RowError

if TYPE_CHECKING:
    from collections.abc import Collection

_SHOWN_CHARACTERS = 200


class MediaError(RowError):
    """A picture or video of a row that cannot be used."""


def shown(path: str) -> str:
    """The path for an error message, in quotes; a data URI of megabytes is cut."""
    return repr(path if len(path) <= _SHOWN_CHARACTERS else f"{path[:_SHOWN_CHARACTERS]}...")


def url_scheme(location: str) -> str | None:
    """The scheme of a URL in lower case, or None for a path of this machine."""
    if location[:5].lower() == "data:":
        return "data"
    scheme, separator, _ = location.partition("://")
    return scheme.lower() if separator else None


def resolve_location(path: str, root: str, *, allowed_schemes: Collection[str], follow_symlinks: bool) -> str:
    """Find what a row's path names, and refuse what lies outside of `root`. Nothing is opened or fetched.

    A path is relative to `root`, or absolute and inside it. A URL needs an allowed scheme; if `root` has the same
    scheme the URL must lie inside `root`, otherwise the allowed scheme is permission enough.

    Args:
        path: as written in the row.
        root: folder or URL prefix of the dataset.
        allowed_schemes: URL schemes that may be read, such as `s3`.
        follow_symlinks: whether a link inside `root` may lead out of it.

    Returns:
        An absolute path, or a URL.

    Raises:
        MediaError: `path_invalid`, `path_scheme`, or `path_escape`.
    """
    _check_text(path)
    scheme = url_scheme(path)
    if scheme is not None and scheme not in allowed_schemes:
        raise MediaError(
            "path_scheme",
            f"{shown(path)} is a URL of scheme {scheme!r}, which is not among data.allowed_schemes="
            f"{sorted(allowed_schemes)}; add the scheme there, or copy the file below {root}",
        )
    root_scheme = url_scheme(root)
    if scheme is not None and scheme != root_scheme:
        return path
    return _resolve_local(path, root, follow_symlinks) if root_scheme is None else _resolve_remote(path, root)


def _check_text(path: str) -> None:
    if not path or "\0" in path:
        raise MediaError("path_invalid", f"the media path {shown(path)} is empty or has a null byte; correct the row")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise MediaError("path_invalid", f"the media path {shown(path)} is no file name: {error}") from error


def _resolve_local(path: str, root: str, follow_symlinks: bool) -> str:
    real_root = Path(os.path.realpath(root))
    # Collapsed before links are followed, so that the file that is checked is the file that is opened.
    target = Path(os.path.normpath(real_root / path))
    written_root = os.path.normpath(Path(root).absolute())
    inside_as_written = target.is_relative_to(real_root) or target.is_relative_to(written_root)
    real_target = Path(os.path.realpath(target))
    if real_target.is_relative_to(real_root) or (follow_symlinks and inside_as_written):
        return str(target)
    if inside_as_written:
        raise MediaError(
            "path_escape",
            f"{shown(path)} is a link that leads to {real_target}, outside of {root}; "
            "if the link is yours, set data.follow_symlinks=true",
        )
    raise _escape(path, root)


def _resolve_remote(path: str, root: str) -> str:
    base = root.rstrip("/") + "/"
    relative = path.removeprefix(base)
    # HTTP clients decode %2e%2e, so a parent folder must be looked for in the decoded path.
    decoded = unquote(relative)
    if url_scheme(relative) is not None or decoded.startswith("/") or ".." in decoded.split("/"):
        raise _escape(path, root)
    return base + relative


def _escape(path: str, root: str) -> MediaError:
    return MediaError(
        "path_escape",
        f"{shown(path)} leads outside of the dataset's root {root}; "
        "media paths stay below root: move the file, or choose a root above it",
    )
