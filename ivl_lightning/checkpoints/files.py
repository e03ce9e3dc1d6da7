"""Reading the weight files of a folder: safetensors, sharded or not; torch files only without code in them."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ivl_lightning.checkpoints.source import CheckpointError, Combined, MemorySource, TensorSource, listed

SAFETENSORS = "model.safetensors"
INDEX_SUFFIX = ".index.json"
_LFS_POINTER = b"version https://git-lfs"
_TORCH_NAMES = ("pytorch_model.bin",)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def open_folder(folder: Path) -> TensorSource:
    """The weights of a folder, under the names in its files.

    Looked for in this order: `model.safetensors.index.json`, `model.safetensors`, any one `*.safetensors`, and
    `pytorch_model.bin` with or without an index.

    Raises:
        CheckpointError: no weights, a file that is missing, damaged or cut short, or one that holds more than tensors.
    """
    for name in (SAFETENSORS, *_TORCH_NAMES):
        index = folder / f"{name}{INDEX_SUFFIX}"
        if index.is_file():
            return _open_index(index)
        if (folder / name).is_file():
            return _open_files(dict.fromkeys([folder / name]))
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return _open_files(dict.fromkeys(loose))
    if loose:
        raise CheckpointError(
            f"{folder} holds {len(loose)} safetensors files ({listed(file.name for file in loose)}) but no "
            f"{SAFETENSORS}{INDEX_SUFFIX}, which says what lies where: fetch it too"
        )
    raise CheckpointError(
        f"{folder} holds no weights: looked for {SAFETENSORS} and {_TORCH_NAMES[0]}, and their indexes"
    )


def open_file(file: Path) -> TensorSource:
    """The tensors of one file.

    Raises:
        CheckpointError: it is missing, damaged or cut short, or holds more than tensors.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file")
    return _SafetensorsFile(file) if file.suffix == ".safetensors" else _open_torch(file)


def _open_index(index: Path) -> TensorSource:
    content = read_json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map: fetch it again")
    names = sorted({str(place) for place in places.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{index} names files outside of its folder: {listed(outside)}. Do not use this checkpoint"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {listed(missing)}. Fetch them")
    files: dict[Path, set[str] | None] = {
        index.parent / name: {key for key, place in places.items() if place == name} for name in names
    }
    return _open_files(files)


def _open_files(files: Mapping[Path, set[str] | None]) -> TensorSource:
    """Several files as one source; what an index says of a file must be so."""
    sources = []
    for file, promised in files.items():
        source = open_file(file)
        found = set(source.names())
        if promised is not None and found != promised:
            lost, surplus = promised - found, found - promised
            said = f"does not hold {listed(lost)}" if lost else f"holds {listed(surplus)}"
            raise CheckpointError(f"{file} {said}, against what its index says: fetch the file and the index again")
        sources.append(source)
    return Combined(sources)


class _SafetensorsFile:
    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._open = safe_open(file, framework="pt")
            # In the order of the bytes, so that a disk is read from front to back.
            self._names = list(self._open.offset_keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or cut short ({error}): fetch it again") from error
        except RuntimeError as error:
            raise CheckpointError(
                f"{file} cannot be mapped into memory ({_first_line(error)}): raise the limit on address space "
                "(ulimit -v), or take a checkpoint in shards"
            ) from error

    def names(self) -> list[str]:
        return self._names

    def meta(self, name: str) -> Tensor:
        view = self._open.get_slice(name)
        dtype = _DTYPES.get(view.get_dtype())
        if dtype is None:
            raise CheckpointError(f"{self._file}: {name} is of type {view.get_dtype()}, which cannot be read")
        return torch.empty(view.get_shape(), dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._open.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._file}: {name} cannot be read ({error}): fetch the file again") from error
        return tensor

    def where(self, name: str) -> str:
        return str(self._file)


def _open_torch(file: Path) -> MemorySource:
    content = load_tensors(file)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) < len(content):
        strange = [str(name) for name in content if name not in tensors]
        raise CheckpointError(f"{file} holds more than tensors: {listed(strange)}. Save its state_dict alone")
    return MemorySource(tensors, str(file))


def load_tensors(file: Path) -> dict[str, Any]:
    """What a torch file holds, tensors mapped into memory; code in it is refused, not run.

    Raises:
        CheckpointError: it is damaged, holds code, or no mapping.
    """
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{file} is damaged or cut short (a pointer of git lfs, not the file): fetch it again"
            )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds Python objects besides tensors, which could run code ({_refused(error)}): convert it to "
            "safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({_first_line(error)}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, needed is a mapping of names to tensors")
    return content


def _refused(error: pickle.UnpicklingError) -> str:
    """What was refused; torch's own message goes on to say how to run it all the same."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return named[1] if named else "torch reads no tensors in it"


def _is_zip(file: Path) -> bool:
    # Files of torch before 1.6 cannot be mapped.
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: there is no such file, or it holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object: fetch it again")
    return content
