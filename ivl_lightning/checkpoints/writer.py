"""Writing a folder of weights shard by shard, and whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ivl_lightning.checkpoints.files import INDEX_SUFFIX, SAFETENSORS
from ivl_lightning.checkpoints.source import TensorSource

SHARD_BYTES = 5_000_000_000
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_RESERVE = 1.01
"""Over the bytes of the weights: headers, tokenizer, a file system's own needs."""


class DiskError(OSError):
    """The disk is full or fails; nothing is wrong with the checkpoint."""


def write_weights(
    source: TensorSource,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write all tensors as `model.safetensors`, or as shards with an index; one shard is in memory at a time.

    Args:
        source: of the tensors, under the names to be written.
        folder: exists.
        shard_bytes: of a file at most, unless one tensor is larger.
        advance: told of bytes written.

    Raises:
        DiskError: no space, or the disk fails.
    """
    sizes = {name: source.meta(name).nbytes for name in source.names()}
    shards = _shards(sizes, shard_bytes)
    names = _file_names(len(shards))
    # A shard goes to the disk while the next one is put together, so that what takes its name in the end lies there.
    with ThreadPoolExecutor(max_workers=1) as flusher:
        flushed = []
        for file, shard in zip(names, shards, strict=True):
            _save(_unshared({name: source.read(name).contiguous() for name in shard}), folder / file)
            flushed.append(flusher.submit(_flush, folder / file))
            advance(sum(sizes[name] for name in shard))
        for done in flushed:
            done.result()
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{SAFETENSORS}{INDEX_SUFFIX}").write_text(text, encoding="utf-8")


def total_bytes(source: TensorSource) -> int:
    """Bytes of all tensors."""
    return sum(source.meta(name).nbytes for name in source.names())


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SAFETENSORS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The format wants bytes of its own for each name: a head that is the embeddings is written twice."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        # Readers, transformers' among them, take a file without this entry for one of another framework.
        save_file(tensors, file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise DiskError(f"{file} cannot be written ({error}): make room, or choose another folder") from error
    # The library makes files that only their owner may read.
    file.chmod(0o644)


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            raise DiskError(f"{file} cannot be written ({error.strerror}): look at the disk") from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse a folder whose disk has no room.

    Args:
        folder: to be written; its nearest existing parent is asked.
        needed: bytes of the weights.

    Raises:
        DiskError: names both numbers.
    """
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(parent).free
    if free < needed * _RESERVE:
        raise DiskError(
            f"{folder} needs {needed / 1e9:,.2f} GB, but its disk has {free / 1e9:,.2f} GB free: make room, or choose "
            "another folder"
        )


@contextmanager
def written_aside(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` that takes its name when all went well; else it is removed and `target` stays.

    Args:
        target: must not exist, or be empty, unless `overwrite`.
        overwrite: replace what is there.

    Raises:
        ValueError: there is something already.
        DiskError: no space, or the disk fails.
    """
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target={target} exists: give another folder, or overwrite=true to replace it")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(f"target={target} is no folder of a checkpoint (it has no config.json) and is not replaced")
    aside = target.with_name(f".{target.name}.partial")
    claim = _claimed(aside, target)
    try:
        yield aside
        replace_folder(aside, target)
    except BaseException as error:
        # Behind a success another command may have begun to write there.
        _remove(aside)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskError(f"{target} cannot be written ({error.strerror}): make room") from error
        raise
    finally:
        os.close(claim)


def _claimed(aside: Path, target: Path) -> int:
    """Make the folder aside and lock it; what a command that was killed left there is removed."""
    try:
        if aside.exists():
            os.close(_locked(aside, target))
        _remove(aside)
        aside.mkdir(parents=True)
        return _locked(aside, target)
    except OSError as error:
        raise DiskError(f"{target} cannot be written ({error.strerror}): choose another folder") from error


def _locked(folder: Path, target: Path) -> int:
    """An open folder that no other process writes to; the system takes the lock back when this one ends."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Network file systems lock files and not folders, or nothing: there two commands are not kept apart.
        if error.errno in _NO_LOCKS:
            return opened
        os.close(opened)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise ValueError(
            f"target={target} is being written by another command: wait for it, or give another folder"
        ) from None
    return opened


def replace_folder(new: Path, target: Path) -> None:
    """Give `new` the name of `target`; what was there is removed only when the new one stands."""
    old = target.with_name(f".{target.name}.old")
    _remove(old)
    if target.exists() or target.is_symlink():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists() or old.is_symlink():
            old.rename(target)
        raise
    _remove(old)


def _remove(place: Path) -> None:
    """A folder with all in it; of a link the link alone."""
    if place.is_symlink() or place.is_file():
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)
