"""Images and videos of a row: opened through one guarded door, measured by header, decoded or refused with a reason."""

from __future__ import annotations

import re
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar, cast, overload

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from ivl_lightning.data.animation import webp_exif, webp_head
from ivl_lightning.data.frames import CallerError, read_frames, read_video_header
from ivl_lightning.data.locations import MediaError, resolve_location, shown, url_scheme
from ivl_lightning.data.storage import (
    Access,
    MachineError,
    MissingPackageError,
    RedirectError,
    chain_of,
    folder_names,
    is_folder,
    machine_fault,
    open_for_passes,
    open_location,
)
from ivl_lightning.data.video import FOLDER_RATE, VideoHeader, check_clip, clip_header, clip_window, frame_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ivl_lightning.data.animation import WebpHead
    from ivl_lightning.data.video import Clip

T = TypeVar("T")

__all__ = ["MAX_PIXELS", "ImageHeader", "MediaError", "MediaReader", "VideoHeader"]

MAX_PIXELS = 89_478_485
"""Largest image by default: Pillow's own limit, above which it warns of decompression bombs (268 MB of RGB)."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")

_UPRIGHT = 1
_UNREADABLE = 0
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

_FRAME_SUFFIX = re.compile(r"\.(?:jpe?g|png|webp)$", re.IGNORECASE)
_FRAME_NUMBER = re.compile(r"(\d+)\.\w+$")


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image file says of itself before a pixel is decoded.

    Attributes:
        width: pixels as stored.
        height: pixels as stored.
        mode: Pillow's mode; one that begins with `I;16` is 16-bit gray, also for a PGM file, whose values Pillow
            brings to 16 bits in a wider mode.
        orientation: EXIF orientation 1 to 8; 1 where there is none, 0 where the EXIF block is broken.
    """

    width: int
    height: int
    mode: str
    orientation: int


@dataclass(frozen=True)
class MediaReader:
    """Opens the media of one dataset. Holds no handle, so that it can go to worker processes.

    Args:
        root: folder, or URL prefix such as `s3://bucket/images`, that media paths are relative to and cannot leave.
        allowed_schemes: URL schemes that may be read through fsspec; none by default.
        follow_symlinks: whether links inside `root` may lead out of it.
        max_pixels: images with more are refused by header. At most what Pillow itself accepts.
        exif_transpose: turn images upright by EXIF; the original ignores the tag.
        gray16: `clip` makes every 16-bit gray value above 255 white, as the original does; `scale` divides by 257.
            TIFF files of 32-bit or signed values, whose range is not known, are clipped in any case.

    Raises:
        ValueError: settings that cannot hold.
    """

    root: str
    allowed_schemes: tuple[str, ...] = ()
    follow_symlinks: bool = False
    max_pixels: int = MAX_PIXELS
    exif_transpose: bool = False
    gray16: Literal["clip", "scale"] = "clip"

    def __post_init__(self) -> None:
        _check_schemes(self.root, self.allowed_schemes)
        _check_max_pixels(self.max_pixels)
        if self.gray16 not in ("clip", "scale"):
            raise ValueError(f"data.gray16 is {self.gray16!r}; choose 'clip' (as the original) or 'scale'")

    def resolve(self, path: str) -> str:
        """Absolute path or URL of a row's media path. Nothing is opened.

        Args:
            path: as written in the row.

        Raises:
            MediaError: `path_invalid`, `path_scheme` or `path_escape`; see `resolve_location`.
        """
        return resolve_location(
            path, self.root, allowed_schemes=self.allowed_schemes, follow_symlinks=self.follow_symlinks
        )

    @contextmanager
    def open(self, path: str, *, access: Access = "whole") -> Iterator[BinaryIO]:
        """Open a media file for reading.

        Args:
            path: as written in the row.
            access: what will be read of a remote file, so that no more of it is fetched.

        Raises:
            MediaError: as `resolve`, and `file_missing` or `file_unreadable`.
            ValueError: a package for the URL's scheme is missing.
            OSError: this machine has run out of memory, disk or open files, here and in all that follow; no row is at
                fault.
        """
        location = self.resolve(path)
        with _reported(path, otherwise="file_unreadable"):
            handle = open_location(location, access)
        with handle:
            yield handle if url_scheme(location) is None else cast(BinaryIO, _RemoteFile(handle, path))

    def header(self, path: str) -> ImageHeader:
        """Read an image's header alone.

        Pillow knows a WebP header only from the whole file. A remote one is therefore read here: its first 30 bytes,
        and its EXIF block if these announce one. Damage behind them shows in `load_image`.

        Args:
            path: as written in the row.

        Raises:
            MediaError: as `open`, and `image_empty`, `image_undecodable` or `image_too_large`.
        """
        with self._checked_file(path, "head") as (file, webp):
            if webp is not None and isinstance(file, _RemoteFile):
                orientation = _exif_orientation(webp_exif(file)) if webp.has_exif else _UPRIGHT
                return ImageHeader(webp.width, webp.height, "RGBA" if webp.has_alpha else "RGB", orientation)
            image = self._opened_image(file, path)
            return ImageHeader(*image.size, mode=_mode(image), orientation=_orientation(image))

    def image_size(self, path: str) -> tuple[int, int]:
        """Width and height of the image that `load_image` returns, from the header alone.

        Args:
            path: as written in the row.

        Raises:
            MediaError: as `header`, and `exif_invalid` if `exif_transpose` is on.
        """
        header = self.header(path)
        if self.exif_transpose and _checked(header.orientation, path) in _SIDEWAYS:
            return header.height, header.width
        return header.width, header.height

    def load_image(self, path: str) -> Image.Image:
        """Decode an image whole. The original trains on truncated files with gray filling; here they are refused.

        Args:
            path: as written in the row.

        Returns:
            The image in mode RGB.

        Raises:
            MediaError: as `image_size`, and `image_truncated`.
            ValueError: another library told Pillow to fill truncated images.
        """
        _check_pillow()
        with self._checked_file(path, "whole") as (file, _):
            image = self._opened_image(file, path)
            orientation = _checked(_orientation(image), path) if self.exif_transpose else _UPRIGHT
            image.load()
            return _upright(_rgb(image, self.gray16), orientation)

    def video_header(self, path: str, clip: Clip | None = None) -> VideoHeader:
        """Read the size, the number of frames and the times of a video; no frame is decoded.

        Args:
            path: as written in the row: an MP4, AVI or Matroska file, a GIF, an animated WebP, or a folder of images
                whose names end in a number. A folder counts as one frame per second.
            clip: start and end in seconds: the frames with `start <= time < end`. None for the whole video.

        Raises:
            MediaError: as `open`, `clip_invalid`, `video_empty`, `video_truncated`, `video_too_large`,
                `video_undecodable`, and `video_frame_name` or a reason of `header` for a folder.
            ValueError: PyAV is needed and not installed.
        """
        check_clip(clip, path)
        if self._is_folder(path):
            names = self._frame_names(path)
            times = np.arange(len(names)) / FOLDER_RATE
            first = names[clip_window(times, clip, path)[0]]
            return clip_header(self.image_size(first), times, len(names) / FOLDER_RATE, FOLDER_RATE, clip, path)
        if clip is None:
            with self.open(path, access="index") as file, _reported(path, otherwise="file_unreadable"):
                return read_video_header(file, path, clip, self.max_pixels)
        with self._open_for_passes(path) as file:
            return read_video_header(file, path, clip, self.max_pixels)

    @overload
    def load_frames(self, path: str, indices: Sequence[int], clip: Clip | None = None) -> list[Image.Image]: ...

    @overload
    def load_frames(
        self, path: str, indices: Sequence[int], clip: Clip | None = None, *, then: Callable[[Image.Image], T]
    ) -> list[T]: ...

    def load_frames(
        self,
        path: str,
        indices: Sequence[int],
        clip: Clip | None = None,
        *,
        then: Callable[[Image.Image], Any] = lambda image: image,
    ) -> list[Any]:
        """Decode frames of a video.

        Args:
            path: as for `video_header`.
            indices: frame numbers in the order of showing, counted from the start of the clip; repeats allowed.
            clip: as for `video_header`.
            then: what to keep of a frame, an image in mode RGB: called as each is decoded, so that not all of them
                need be held at full size. The frame itself by default.

        Returns:
            What `then` gave, one for each index; where an index repeats, the same object.

        Raises:
            MediaError: as `video_header`; `video_frame_missing` for an index beyond the end; for a folder also as
                `load_image`. A frame that cannot be decoded is never replaced by another.
            ValueError: as `video_header` and `load_image`.
            Exception: what `then` raises, as it is.
        """
        check_clip(clip, path)
        if self._is_folder(path):
            names = self._frame_names(path)
            numbers = frame_numbers(np.arange(len(names)) / FOLDER_RATE, indices, clip, path)
            loaded = {number: then(self.load_image(names[number])) for number in sorted(set(numbers))}
            return [loaded[number] for number in numbers]
        _check_pillow()
        try:
            with self._open_for_passes(path) as file:
                return read_frames(file, path, indices, clip, self.max_pixels, then)
        except CallerError as error:
            own = error.own
        raise own

    @contextmanager
    def _open_for_passes(self, path: str) -> Iterator[BinaryIO]:
        location = self.resolve(path)
        with _reported(path, otherwise="file_unreadable"), open_for_passes(location) as file:
            yield file

    def _is_folder(self, path: str) -> bool:
        location = self.resolve(path)
        with _reported(path, otherwise="file_unreadable"):
            return is_folder(location)

    def _frame_names(self, path: str) -> list[str]:
        """Paths of a folder's frames in the order of the numbers that their names end in. Other files do not count."""
        location = self.resolve(path)
        with _reported(path, otherwise="file_unreadable"):
            # Names that begin with a point are hidden: macOS lays `._clip_1.jpg` beside `clip_1.jpg`.
            names = [name for name in folder_names(location) if _FRAME_SUFFIX.search(name) and name[0] != "."]
        numbers = {}
        for name in names:
            number = _FRAME_NUMBER.search(name)
            if number is None or int(number[1]) in numbers:
                fault = "has no number before its suffix" if number is None else f"repeats the number {number[1]}"
                raise MediaError(
                    "video_frame_name",
                    f"{shown(name)} in the folder of frames {shown(path)} {fault}; name the frames NAME_1.jpg, "
                    "NAME_2.jpg and so on, and keep other images elsewhere",
                )
            numbers[int(number[1])] = f"{path.rstrip('/')}/{name}"
        return [numbers[number] for number in sorted(numbers)]

    @contextmanager
    def _checked_file(self, path: str, access: Access) -> Iterator[tuple[BinaryIO, WebpHead | None]]:
        """A file at its start, and its head if it is a WebP of no more pixels than are allowed."""
        with self.open(path, access=access) as file, _reported(path, otherwise="image_undecodable"):
            head = file.read(30)
            if not head:
                raise MediaError("image_empty", f"{shown(path)} has no bytes; fetch the file again or remove the row")
            webp = webp_head(head)
            if webp is not None:
                self._check_size(webp.width, webp.height, path)
            file.seek(0)
            yield file, webp

    def _opened_image(self, file: BinaryIO, path: str) -> Image.Image:
        image = Image.open(file, formats=_formats())
        self._check_size(*image.size, path)
        return image

    def _check_size(self, width: int, height: int, path: str) -> None:
        if width * height > self.max_pixels:
            raise MediaError(
                "image_too_large",
                f"{shown(path)} announces {width} x {height} = {width * height} pixels, more than "
                f"data.max_pixels={self.max_pixels}; shrink the image or raise the limit",
            )


class _RemoteFile:
    """A file behind fsspec. What fails in reading it is told from what fails in decoding it, by the same reasons."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path

    def read(self, size: int = -1) -> bytes:
        with _reported(self._path, otherwise="file_unreadable"):
            return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _check_schemes(root: str, allowed_schemes: tuple[str, ...]) -> None:
    if isinstance(allowed_schemes, str):
        raise ValueError(f"data.allowed_schemes is the text {allowed_schemes!r}; write a list: [{allowed_schemes}]")
    for scheme in allowed_schemes:
        if scheme in ("file", "local", "data") or not scheme.isalnum() or not scheme.islower():
            raise ValueError(
                f"data.allowed_schemes has {scheme!r}; write the bare name in lower case, such as s3 or https. "
                "Local files need no scheme, and data URIs are not read"
            )
    root_scheme = url_scheme(root)
    if root_scheme is not None and root_scheme not in allowed_schemes:
        raise ValueError(
            f"root {root} has the scheme {root_scheme!r}, which is not among data.allowed_schemes="
            f"{list(allowed_schemes)}; add it there to read from the network"
        )


def _check_max_pixels(max_pixels: int) -> None:
    if max_pixels < 1:
        raise ValueError(f"data.max_pixels is {max_pixels}; it must be at least 1")
    # Pillow raises above twice its limit whatever we think, and its globals belong to the user's process, not to us.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"data.max_pixels is {max_pixels}, but Pillow refuses images above {2 * Image.MAX_IMAGE_PIXELS} "
            "pixels (twice PIL.Image.MAX_IMAGE_PIXELS); lower data.max_pixels or shrink the images"
        )


def _check_pillow() -> None:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: some code of this process asked Pillow to fill truncated "
            "images with gray, so they can no longer be told from whole ones; find it and leave the flag False"
        )


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    # A closed list: Pillow would hand an EPS file to Ghostscript, an outside program, whatever the file is called.
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _reported(path: str, otherwise: str) -> Iterator[None]:
    try:
        yield
    except (MediaError, MissingPackageError, MachineError, CallerError):
        raise
    # Broad on purpose: decoders and network clients raise what their C libraries do (SyntaxError, struct.error,
    # client classes of each store), and one bad file must not end a run of days. It is reported, never dropped.
    except Exception as error:
        if fault := machine_fault(error, path):
            raise fault from error
        # fsspec calls a file missing that it was led away from.
        told = next((link for link in chain_of(error) if isinstance(link, RedirectError)), error)
        reason = _reason(told, otherwise)
        raise MediaError(reason, f"{shown(path)}: {_ADVICE[reason]} ({type(told).__name__}: {told})") from error


_ADVICE = {
    "file_missing": "no such file; check the path and the dataset's root",
    "path_escape": "the server names another address, which may lie outside of the dataset's root; write that address",
    "file_unreadable": "the file cannot be opened; check its kind and permissions, or the connection",
    "image_too_large": "Pillow takes its size for a decompression bomb; shrink the image",
    "image_truncated": "the image ends too early; fetch the file again or remove the row",
    "image_undecodable": f"not an image that can be decoded, of {', '.join(_FORMATS)}; replace it or remove the row",
}


def _reason(error: BaseException, otherwise: str) -> str:
    if isinstance(error, RedirectError):
        return "path_escape"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "file_missing"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "image_too_large"
    if isinstance(error, UnidentifiedImageError):
        return "image_undecodable"
    # Pillow has no class of its own for this. "Truncated File Read" and "image file is truncated" are its words.
    if otherwise == "image_undecodable" and (isinstance(error, EOFError) or "truncated" in str(error).lower()):
        return "image_truncated"
    # Pillow's own OSErrors carry no error number; those of the operating system do.
    if isinstance(error, OSError) and error.errno is not None:
        return "file_unreadable"
    return otherwise


def _orientation(image: Image.Image) -> int:
    # Not `image.getexif()`: for a PNG it decodes the whole image to look for a block behind the pixels. TIFF needs
    # nothing: Pillow turns it upright itself.
    return _exif_orientation(image.info.get("exif"))


def _exif_orientation(block: bytes | None) -> int:
    if not block:
        return _UPRIGHT
    exif = Image.Exif()
    try:
        exif.load(block)
        orientation = exif.get(ExifTags.Base.Orientation, _UPRIGHT)
    except (SyntaxError, struct.error, ValueError, TypeError, LookupError, OSError):
        return _UNREADABLE
    return orientation if orientation in _TRANSPOSE else _UPRIGHT


def _checked(orientation: int, path: str) -> int:
    if orientation == _UNREADABLE:
        raise MediaError(
            "exif_invalid",
            f"{shown(path)} has a broken EXIF block, so its orientation is unknown; "
            "repair the file, or set data.exif_transpose=false",
        )
    return orientation


def _mode(image: Image.Image) -> str:
    # Pillow scales a PGM file of more than 8 bits to 0 to 65535, whatever its own highest value, and calls it "I".
    return "I;16" if image.format == "PPM" and image.mode == "I" else image.mode


def _rgb(image: Image.Image, gray16: str) -> Image.Image:
    if gray16 == "scale" and _mode(image).startswith("I;16"):
        levels = np.asarray(image).astype(np.float32)
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)
