"""Reading a run that W&B has kept offline, without its server and its tools."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_HEADER, _BLOCK = 7, 32 * 1024
_FULL, _LAST = 1, 4


@dataclass
class OfflineRun:
    """What the file of an offline run holds.

    Attributes:
        id, group, name, job_type, tags: by which the run is found.
        config: its settings.
        history: logged rows, in their order.
        axes: pattern of metrics -> the metric they are drawn over.
    """

    id: str = ""
    group: str = ""
    name: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)


def records(path: Path) -> Iterator[Record]:
    """Its records, in LevelDB's log format: blocks of 32 KiB, in them pieces of checksum, length, kind and content."""
    content, place, parts = path.read_bytes(), _HEADER, b""
    assert content[:4] == b":W&B"
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        parts += content[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""


def read_offline_run(path: Path) -> OfflineRun:
    """The run in a file `run-ID.wandb`."""
    run = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            told = record.run
            run.id, run.group, run.name = told.run_id, told.run_group, told.display_name
            run.job_type, run.tags = told.job_type, list(told.tags)
        config = record.run.config if kind == "run" else record.config
        for item in config.update:
            _put(run.config, [item.key] if item.key else list(item.nested_key), json.loads(item.value_json))
        if kind == "history":
            items = record.history.item
            run.history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        if kind == "metric" and record.metric.step_metric:
            run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return run


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value
