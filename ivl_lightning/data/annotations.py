"""The official meta file and its annotation files: what a dataset is, its rows, and the media a row names."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from ivl_lightning.config.schema import Metric
from ivl_lightning.data.json_spans import RowSpan, row_spans
from ivl_lightning.data.locations import url_scheme
from ivl_lightning.structures import RowError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

_REQUIRED_KEYS = ("root", "annotation", "data_augment", "repeat_time")
_OPTIONAL_KEYS = ("max_dynamic_patch", "length", "metric")
_KEYS = _REQUIRED_KEYS + _OPTIONAL_KEYS

METRIC_NAMES: tuple[Metric, ...] = get_args(Metric)


class MetaError(ValueError):
    """A meta file that cannot be used.

    Args:
        reason: a short class of fault (`meta_key_missing`, `meta_value`, ...).
        message: file, dataset, key, and what to do.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[MetaError], tuple[str, str]]:
        # Pickle would otherwise call the class with the message alone.
        return type(self), (self.reason, str(self))


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One entry of a meta file. Its `length` is for people and is not read, as in the original.

    Attributes:
        name: key of the entry.
        root: absolute folder, or URL prefix, of the media.
        annotation: absolute path of the JSONL file or JSON list.
        data_augment: whether tiles are degraded by JPEG in training.
        repeat_time: how often the rows are seen in an epoch; a fraction takes a part of them.
        max_dynamic_patch: most grid tiles of a sample of this dataset; None for the run's `data.max_tiles`.
        metric: by which its answers are scored in validation; None for the run's `eval.metric`.
    """

    name: str
    root: str
    annotation: str
    data_augment: bool
    repeat_time: float
    max_dynamic_patch: int | None = None
    metric: Metric | None = None


def read_meta(path: str | Path) -> tuple[DatasetSpec, ...]:
    """Read an official `meta.json`: `{name: {root, annotation, data_augment, repeat_time, ...}}`.

    `root` and `annotation` are absolute or relative to the folder of the meta file.

    Args:
        path: the meta file.

    Returns:
        The datasets in the order of the file.

    Raises:
        MetaError: a file, key or value that cannot be used; the message names it.
    """
    file = Path(path).absolute()
    entries = _read_json(file)
    if not isinstance(entries, dict) or not entries:
        raise MetaError(
            "meta_invalid",
            f"{file}: expected an object of datasets by name, found {_kind(entries)}; "
            f'write {{"NAME": {{{", ".join(_REQUIRED_KEYS)}}}}}',
        )
    return tuple(_dataset(file, name, entry) for name, entry in entries.items())


def _read_json(file: Path) -> object:
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique)
    except OSError as error:
        raise MetaError("meta_missing", f"{file}: cannot be read ({error.strerror}); check data.meta") from error
    except _DuplicateKeyError as error:
        raise MetaError(
            "meta_duplicate",
            f"{file}: the name {error.args[0]!r} stands twice in one object, and JSON would keep the last only; "
            "rename or remove one",
        ) from error
    except (ValueError, RecursionError) as error:
        raise MetaError("meta_invalid", f"{file}: not valid JSON ({error}); correct the file") from error


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _dataset(file: Path, name: str, entry: object) -> DatasetSpec:
    place = f"{file}: dataset {name!r}"
    if not isinstance(entry, dict):
        raise MetaError("meta_value", f"{place} is {_kind(entry)}, not an object; give it the keys {', '.join(_KEYS)}")
    _check_keys(place, entry)
    return DatasetSpec(
        name=name,
        root=_root(place, file.parent, entry["root"]),
        annotation=_annotation(place, file.parent, entry["annotation"]),
        data_augment=_boolean(place, "data_augment", entry["data_augment"]),
        repeat_time=_repeat_time(place, entry["repeat_time"]),
        max_dynamic_patch=_max_dynamic_patch(place, entry.get("max_dynamic_patch")),
        metric=_metric(place, entry.get("metric")),
    )


def _check_keys(place: str, entry: dict[str, object]) -> None:
    accepted = f"required are {', '.join(_REQUIRED_KEYS)}; accepted too are {', '.join(_OPTIONAL_KEYS)}"
    for key in entry:
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise MetaError("meta_key_unknown", f"{place} has an unknown key {key!r}: {hint} ({accepted})")
    for key in _REQUIRED_KEYS:
        if key not in entry:
            raise MetaError("meta_key_missing", f"{place} has no key {key!r}; add it ({accepted})")


def _root(place: str, folder: Path, value: object) -> str:
    text = _text(place, "root", value)
    return text if url_scheme(text) is not None else str(folder / text)


def _annotation(place: str, folder: Path, value: object) -> str:
    text = _text(place, "annotation", value)
    if url_scheme(text) is not None:
        raise MetaError(
            "meta_value",
            f"{place}: 'annotation' is the URL {text}; rows are read by byte offset, so copy the file to a local disk",
        )
    target = folder / text
    if not text or not target.is_file():
        raise MetaError(
            "annotation_missing",
            f"{place}: 'annotation' is {text!r}, but {target} is not a file; "
            "give a path that is absolute or relative to the folder of the meta file",
        )
    return str(target)


def _text(place: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(place, key, value, "a text in quotes")
    return value


def _boolean(place: str, key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(place, key, value, "true or false")
    return value


def _repeat_time(place: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _wrong(place, "repeat_time", value, "a number above 0 (to leave a dataset out, remove its entry)")
    return value


def _max_dynamic_patch(place: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(place, "max_dynamic_patch", value, "a whole number of at least 1 (or no such key)")
    return value


def _metric(place: str, value: object) -> Metric | None:
    if value is None:
        return None
    for name in METRIC_NAMES:
        if value == name:
            return name
    raise _wrong(place, "metric", value, f"one of {', '.join(METRIC_NAMES)} (or no such key)")


def _wrong(place: str, key: str, value: object, expected: str) -> MetaError:
    return MetaError("meta_value", f"{place}: {key!r} is {json.dumps(value)[:100]}, expected {expected}")


def _kind(value: object) -> str:
    if value in ({}, []):
        return "nothing"
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


class AnnotationFile:
    """Rows of a JSONL file, or of a JSON list, by byte offset. The file is never held in memory whole.

    Args:
        path: the file. It is opened anew for each use, so that worker processes can share this object.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def iter_lines(self) -> Iterator[RowSpan]:
        """Yield `(line, offset, length)` of each row; blank lines are passed over. See `row_spans`."""
        with self.path.open("rb") as file:
            yield from row_spans(file)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of one row.

        Raises:
            RowError: `row_lost` if the file ends before them.
        """
        with self.path.open("rb") as file:
            return self._read(file, offset, length)

    def _read(self, file: BinaryIO, offset: int, length: int) -> bytes:
        file.seek(offset)
        raw = file.read(length)
        if len(raw) < length:
            raise RowError(
                "row_lost",
                f"{self.path} has {len(raw)} of {length} bytes at offset {offset}; the file was changed after it "
                "was indexed: build the index again",
            )
        return raw

    def read_spans(self, spans: Sequence[RowSpan]) -> Iterator[bytes]:
        """Bytes of some rows, in one opening of the file.

        Raises:
            RowError: as `read`.
        """
        with self.path.open("rb") as file:
            for span in spans:
                yield self._read(file, span.offset, span.length)

    @staticmethod
    def parse(raw: bytes) -> dict[str, object]:
        """Parse the bytes of one row.

        Args:
            raw: UTF-8 JSON.

        Returns:
            The row.

        Raises:
            RowError: `json_invalid` for broken JSON, bytes or text that are not Unicode, and anything but an object.
        """
        if not raw:
            raise RowError(
                "json_invalid",
                "the JSON list does not end where the file ends: it is cut off, or there is text behind its bracket",
            )
        try:
            row = json.loads(raw.decode("utf-8"))
            # JSON can spell half of a surrogate pair, which no tokenizer accepts; better refused here, with a place.
            if b"\\u" in raw:
                json.dumps(row, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise RowError("json_invalid", f"not valid JSON ({error}); correct or remove the row") from error
        if not isinstance(row, dict):
            raise RowError("json_invalid", f"the row is {_kind(row)}, not an object; write one {{...}} per row")
        return row


class RowMedia(NamedTuple):
    """Media of a row. `image` is one image as text, `images` a list of any length; they differ in placeholder rules.

    `clip` is the part of the video that is used, from and to in seconds.
    """

    kind: Literal["text", "image", "images", "video"]
    images: tuple[str, ...] = ()
    video: str | None = None
    clip: tuple[float, float] | None = None


def media_of(row: dict[str, object]) -> RowMedia:
    """Find a row's media by the official order: a non-empty `image`, else a non-empty `video`, else text.

    Args:
        row: as parsed. null counts as absent, where the original fails on `"image": null`.

    Raises:
        RowError: `media_invalid` for a value of another type.
    """
    image, video = row.get("image"), row.get("video")
    if image not in (None, "", []):
        return _images(image)
    if video in (None, ""):
        return RowMedia("text")
    if not isinstance(video, str):
        raise RowError("media_invalid", f"'video' is {_kind(video)}; write one path as text")
    return RowMedia("video", video=video, clip=_clip(row.get("clip")))


def _clip(value: object) -> tuple[float, float] | None:
    if value in (None, []):
        return None
    numbers = [_clip_end(entry) for entry in value] if isinstance(value, list) else []
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1] < math.inf:
        raise RowError("media_invalid", f"'clip' is {json.dumps(value)[:100]}; write [start, end] in seconds")
    return numbers[0], numbers[1]


def _clip_end(value: object) -> float:
    """Seconds; not a number for anything else, infinity for what is too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _images(value: object) -> RowMedia:
    if isinstance(value, str):
        return RowMedia("image", (value,))
    if isinstance(value, list) and all(isinstance(path, str) and path for path in value):
        return RowMedia("images", tuple(value))
    found = "a list with something else than paths" if isinstance(value, list) else _kind(value)
    raise RowError("media_invalid", f"'image' is {found}; write one path as text, or a list of paths")
