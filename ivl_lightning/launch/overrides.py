"""The command line: what is added to it, what is checked before Hydra sees it, and how values are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from ivl_lightning.config.check import ConfigError, unknown_key

GROUPS = frozenset(
    (
        "model",
        "data",
        "stage",
        "loss",
        "optim",
        "eval",
        "trainer",
        "strategy",
        "preference",
        "lora",
        "callbacks",
        "logger",
        "launcher",
        "recipe",
        "experiment",
    )
)


def complete(arguments: Sequence[str], recipes: Sequence[str]) -> list[str]:
    """Add what goes without saying.

    * `model=NAME` alone brings the recipe of that name, or none where there is none: the numbers of one model do not
      suit another.
    * `data.meta=PATH` alone drops the default validation data, which belong to the default training data.

    Args:
        arguments: of the command line.
        recipes: names of the recipe group.
    """
    values = {key: value for key, _, value in (argument.lstrip("+").partition("=") for argument in arguments)}
    added = []
    if "model" in values and "recipe" not in values:
        added.append(f"recipe={values['model'] if values['model'] in recipes else 'none'}")
    if "data.meta" in values and "data.val_meta" not in values:
        added.append("data.val_meta=null")
    return _before_overrides(arguments, added)


def with_job_launcher(arguments: Sequence[str]) -> list[str]:
    """The arguments; those of a multirun let Hydra hand its jobs to `launch.multirun`.

    Raises:
        ConfigError: they choose one of Hydra's launchers, which know nothing of ranks, GPUs and stages.
    """
    if not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        return list(arguments)
    chosen = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") == "hydra/launcher"]
    if chosen:
        raise ConfigError(f"{chosen[0]} has no effect on train.py: use launcher=none, launcher=local or launcher=slurm")
    return _before_overrides(arguments, ["hydra/launcher=ivl_lightning"])


def _before_overrides(arguments: Sequence[str], added: Sequence[str]) -> list[str]:
    # Before the first override: Hydra takes overrides neither in front of its flags nor behind them.
    place = next((index for index, argument in enumerate(arguments) if _is_override(argument)), len(arguments))
    return [*arguments[:place], *added, *arguments[place:]]


def forced(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `++` before plain settings.

    Hydra then accepts a misspelt setting, and the check of the settings refuses it with the accepted names.

    Raises:
        ConfigError: an argument that is no override.
    """
    parser = OverridesParser.create()

    def force(argument: str) -> str:
        if "=" not in argument or argument.startswith(("-", "+", "~")):
            return argument
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise ConfigError(f"{argument} cannot be read: {error}") from error
        return argument if _is_choice(override) else f"++{argument}"

    return [force(argument) for argument in arguments]


def _is_choice(override: Override) -> bool:
    """Whether an override chooses a file of a group, or is Hydra's own."""
    key = override.key_or_group
    return key in GROUPS or "/" in key or key.split(".")[0] == "hydra" or override.package is not None


def check_keys(arguments: Sequence[str]) -> None:
    """Refuse a misspelt setting with the accepted ones; Hydra's own message names none.

    Raises:
        ConfigError: lists every misspelt key.
    """
    faults = [fault for override in parse(arguments) if (fault := _fault(override)) is not None]
    if faults:
        raise ConfigError("\n".join(faults))


def parse(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments; Hydra's own flags are left out."""
    return OverridesParser.create().parse_overrides([argument for argument in arguments if _is_override(argument)])


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _fault(override: Override) -> str | None:
    key = override.key_or_group
    if key == "stage":
        return f"stage={override.value()} is chosen by the chain: use stages=[{override.value()}]"
    if _is_choice(override):
        return None
    path = key.split(".")
    if path[:2] == ["recipe", "stages"]:
        path = path[3:]
    return unknown_key(path)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A nested mapping as forced overrides, `++a.b=value`, in order."""
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}.")
        else:
            yield f"++{path}={literal(value)}"


def literal(value: Any) -> str:
    """A plain value in Hydra's override grammar, its type kept.

    Raises:
        TypeError: a value that has no such form.
        ConfigError: a key of a mapping that has none.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(literal(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key)}:{literal(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as a Hydra override")


def _key(key: object) -> str:
    # Keys take no quotes: what means something to the grammar is escaped, and other signs have no form at all.
    escaped = re.sub(r"([\\()\[\]{}:=, ])", r"\\\1", str(key))
    if not re.fullmatch(r"(?:\\.|[A-Za-z0-9_/+.$%*@?|-])+", escaped):
        raise ConfigError(f"{key!r} cannot be a key on a command line: use letters of ASCII, digits, _, - and blanks")
    return escaped


def _quoted(text: str) -> str:
    # In Hydra's grammar a backslash is special only in front of a quote or at the end of the string.
    escaped = text.replace("\\'", "\\\\\\'") if "\\'" in text else text.replace("'", "\\'")
    if escaped.endswith("\\"):
        escaped += "\\"
    return f"'{escaped}'"
