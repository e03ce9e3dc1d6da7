"""Pictures and videos of a conversation: read when they are shown, and as they were then for the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ivl_lightning.data.locations import MediaError, shown, url_scheme
from ivl_lightning.data.media import MediaReader, VideoHeader
from ivl_lightning.data.video import Clip

Picture = str | Path | Image.Image
"""A file, an https address, or a picture that is open already."""

_SCHEMES = ("http", "https", "s3", "gs")


@dataclass(frozen=True)
class ShownMedia(MediaReader):
    """The user's own media, by the names that rows of the conversation give them.

    They may lie anywhere: there is no data set whose rows could lead out of its root. A file that changes or goes away
    later does not change what was shown.

    Args:
        exif_transpose: see `MediaReader`.
    """

    root: str = "/"
    allowed_schemes: tuple[str, ...] = _SCHEMES
    follow_symlinks: bool = True
    _pictures: dict[str, Image.Image] = field(default_factory=dict, repr=False)
    _headers: dict[str, VideoHeader] = field(default_factory=dict, repr=False)
    _frames: dict[tuple[str, tuple[int, ...]], list[Any]] = field(default_factory=dict, repr=False)

    def show_picture(self, picture: Picture) -> str:
        """Read a picture and return its name for the row.

        Raises:
            MediaError: it cannot be read; names the file.
        """
        if isinstance(picture, Image.Image):
            return self._keep("picture", picture.convert("RGB"))
        location = _location(picture)
        return self._keep(location, super().load_image(location))

    def show_video(self, video: str | Path) -> str:
        """Read the header of a video and return its name for the row.

        Raises:
            MediaError: it cannot be read; names the file.
            ValueError: PyAV is needed and not installed.
        """
        location = _location(video)
        self._headers[location] = super().video_header(location)
        return location

    def forget(self) -> None:
        """Drop all that was shown."""
        for kept in (self._pictures, self._headers, self._frames):
            kept.clear()

    def load_image(self, path: str) -> Image.Image:
        """The picture of this name, as it was when it was shown."""
        return self._pictures[path]

    def video_header(self, path: str, clip: Clip | None = None) -> VideoHeader:
        """The header of the video of this name, as it was when it was shown."""
        return self._headers[path]

    def load_frames(
        self,
        path: str,
        indices: Sequence[int],
        clip: Clip | None = None,
        *,
        then: Callable[[Image.Image], Any] = lambda image: image,
    ) -> list[Any]:
        """As `MediaReader.load_frames`, once: a conversation takes the same frames in the same way at each turn."""
        key = path, tuple(indices)
        if key not in self._frames:
            self._frames[key] = super().load_frames(path, indices, clip, then=then)
        return self._frames[key]

    def _keep(self, name: str, picture: Image.Image) -> str:
        """Under a name of its own: the same file may be shown again when it has changed."""
        number = len(self._pictures) + 1
        unique = f"{name} ({number})"
        self._pictures[unique] = picture
        return unique


def _location(path: str | Path) -> str:
    text = str(path)
    if url_scheme(text) is not None:
        return text
    absolute = Path(text).expanduser().absolute()
    if not absolute.exists():
        raise MediaError("file_missing", f"{shown(text)}: there is no such file; relative paths start in {Path.cwd()}")
    return str(absolute)
