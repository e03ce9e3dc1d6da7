"""From a composed mapping to the typed settings, with errors that name key, value and what is accepted."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ivl_lightning.config.schema import RunConfig

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A setting is misspelt, missing, of a wrong type, or contradicts another one."""


def load(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Check `values` against the dataclass `kind` and build it.

    Raises:
        ConfigError: lists every fault with its key, value and the accepted names or type.
    """
    try:
        # JSON is the form in which a nested mapping may stand for a dataclass while nothing else is converted.
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        faults = [_describe(kind, fault) for fault in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(faults))) from None


def unknown_key(path: Sequence[str]) -> str | None:
    """A sentence on the first misspelt key of a dotted path below `RunConfig`, or None where the path exists."""
    kind: Any = RunConfig
    for depth, key in enumerate(path):
        fields = _fields(kind)
        if not fields:
            return None
        if key not in fields:
            return _misspelt(".".join(path[: depth + 1]), key, list(fields))
        kind = fields[key]
    return None


def is_group(key: str) -> bool:
    """Whether a dotted key below `RunConfig` is a group of settings, and no setting whose value is a mapping."""
    if "." not in key:
        return True
    kind: Any = RunConfig
    for part in key.split("."):
        kind = _fields(kind).get(part)
    return bool(_fields(kind))


def _describe(kind: type, fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    if fault["type"] == "unexpected_keyword_argument":
        return _misspelt(key, location[-1], list(_fields(_kind_at(kind, location[:-1]))))
    if fault["type"] == "missing":
        return f"{key} is missing: give it on the command line or in the config"
    return f"{key}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _misspelt(path: str, key: str, accepted: list[str]) -> str:
    close = difflib.get_close_matches(key, accepted, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{path} is not a setting.{hint} Accepted here: {', '.join(sorted(accepted))}"


def _kind_at(kind: Any, path: Sequence[str]) -> Any:
    for key in path:
        kind = _fields(kind).get(key)
    return kind


def _fields(kind: Any) -> dict[str, Any]:
    """Field types of a dataclass, or of the one dataclass in a union; empty for anything else."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next((option for option in get_args(kind) if dataclasses.is_dataclass(option)), None)
    if not dataclasses.is_dataclass(kind):
        return {}
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
