"""Arguments as the agent of W&B writes them, as overrides of Hydra with their types kept.

`${args_json}` in a sweep's `command` keeps every type: the sweeps of `conf/sweep` use it. `${args_no_hyphens}` writes
values as Python's `str` does, which Hydra reads as something else or not at all. What can mean one thing only is
understood too: None, lists and mappings of Python, and text that Hydra cannot read.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ivl_lightning.config.check import ConfigError, is_group
from ivl_lightning.launch.overrides import GROUPS, literal


def plain_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line in Hydra's grammar; what is in it already stays as it is.

    Raises:
        ConfigError: an argument begins as a JSON object and is none.
    """
    return [plain for argument in arguments for plain in _plain(argument)]


def settings(values: Mapping[str, Any]) -> Iterator[str]:
    """Settings with plain values as overrides, `++key=value`, in order.

    Nested parameters of a sweep come as a mapping: `{"optim": {"lr": 1e-5}}` is `optim.lr`. Below a setting a
    mapping is its value, as that of `data.weights`. A text for a group chooses its file: `{"lora": "llm"}`.

    Args:
        values: dotted key -> plain value.
    """
    for key, value in values.items():
        if isinstance(value, Mapping) and is_group(key):
            yield from settings({f"{key}.{name}": inner for name, inner in value.items()})
        elif key in GROUPS or "/" in key:
            yield f"{key}={value if isinstance(value, str) else literal(value)}"
        else:
            # Also keys that the composed configuration does not have yet, as those of data.weights.
            yield f"++{key}={literal(value)}"


def _plain(argument: str) -> list[str]:
    if argument.startswith("{"):
        return list(settings(_json(argument)))
    key, sign, text = argument.partition("=")
    if not sign or key.startswith(("-", "~", "hydra")):
        return [argument]
    value = _python(text)
    if isinstance(value, Mapping):
        # Hydra's grammar has no quoted keys, so this cannot have been written for it.
        return list(settings({key.lstrip("+"): value})) if value else [argument]
    if _holds_none_or_mapping(value):
        return [f"{key}={literal(value)}"]
    return [argument if _is_readable(argument) or text.startswith(_OPENING) else f"{key}={literal(text)}"]


# What begins so and cannot be read is a mistake in Hydra's grammar and no text.
_OPENING = ("[", "{", "(", "'", '"', "$")


def _json(argument: str) -> dict[str, Any]:
    try:
        values = json.loads(argument)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{argument} begins as a JSON object of settings, but cannot be read: {error}") from error
    assert isinstance(values, dict)
    return values


_NO_LITERAL = object()


def _python(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return _NO_LITERAL


def _holds_none_or_mapping(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_none_or_mapping, value))
    return value is None or isinstance(value, Mapping)


def _is_readable(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True
