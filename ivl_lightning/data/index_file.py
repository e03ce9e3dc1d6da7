"""An index on disk: Parquet files that are whole or not there, and the parts of one that is being made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ivl_lightning.data.measuring import COLUMNS, Measured, concatenate
from ivl_lightning.structures import Reject

_TYPES = {"str": pa.string(), "str | None": pa.string(), "int": pa.int64(), "bool": pa.bool_()}
_REJECTS = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(Reject)])


class BrokenIndexError(Exception):
    """A file that is not a whole index; the rows have to be measured again."""


class IndexWriteError(ValueError):
    """The cache folder does not take the index (a full disk, no permission)."""


def read_index(path: Path) -> Measured:
    """All columns and rejects of an index file or of a part.

    Raises:
        BrokenIndexError: the file is cut off, or was not written by this version.
    """
    try:
        table = pq.read_table(path, memory_map=True)
        end = int((table.schema.metadata or {})[b"ivl_lightning_end"])
        columns = {name: table[name].to_numpy().astype(dtype, copy=False) for name, dtype in COLUMNS.items()}
        rejects = pq.read_table(_rejects_path(path)).to_pylist()
        return Measured(columns, tuple(Reject(**line) for line in rejects), end)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise BrokenIndexError(f"{path} is not a whole index ({type(error).__name__}: {error})") from error


def write_index(path: Path, measured: Measured) -> None:
    """Write an index, or a part of one; other processes see the whole or nothing.

    Raises:
        IndexWriteError: the folder does not take it.
    """
    columns = {field.name: [getattr(line, field.name) for line in measured.rejects] for field in fields(Reject)}
    # The rejects first: an index that is there has its rejects.
    with writing(_rejects_path(path)) as aside:
        pq.write_table(pa.table(columns, schema=_REJECTS), aside)
    table = pa.table(measured.columns).replace_schema_metadata({"ivl_lightning_end": str(measured.end)})
    with writing(path) as aside:
        pq.write_table(table, aside)


def _rejects_path(path: Path) -> Path:
    return path.with_suffix(".rejects")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is written: a killed process leaves no half file.

    Raises:
        IndexWriteError: the folder does not take it.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.replace(path)
    except OSError as error:
        raise IndexWriteError(
            f"cannot write {path}: {error}. Make room there, or give data.cache_dir another folder; "
            "what was measured until now is kept and will not be measured again"
        ) from error
    finally:
        # Where the folder itself is the trouble there is nothing to remove either.
        with suppress(OSError):
            aside.unlink(missing_ok=True)


class IndexParts:
    """What was measured of a file so far, so that a killed process need not begin again.

    Args:
        folder: of the parts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = self._read()

    @property
    def end(self) -> int:
        """Offset behind the last measured row; 0 at the beginning."""
        return self._parts[-1].end if self._parts else 0

    @property
    def num_rows(self) -> int:
        """Rows measured so far."""
        return sum(part.num_rows for part in self._parts)

    def add(self, stretches: Sequence[Measured]) -> None:
        """Keep consecutive stretches as the next part.

        Raises:
            IndexWriteError: the folder does not take it.
        """
        part = concatenate(stretches)
        write_index(self.folder / f"{len(self._parts):06d}.parquet", part)
        self._parts.append(part)

    def finish(self, path: Path, rest: Sequence[Measured]) -> Measured:
        """Write the whole index and remove the parts.

        Raises:
            IndexWriteError: the folder does not take it.
        """
        whole = concatenate([*self._parts, *rest])
        write_index(path, whole)
        shutil.rmtree(self.folder, ignore_errors=True)
        return whole

    def _read(self) -> list[Measured]:
        parts: list[Measured] = []
        while (path := self.folder / f"{len(parts):06d}.parquet").is_file():
            try:
                parts.append(read_index(path))
            except BrokenIndexError:
                # This part and what follows it are measured again.
                break
        return parts
