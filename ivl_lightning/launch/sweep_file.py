"""A sweep as W&B describes it in YAML, for those who run it without W&B: read, and checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.overrides import check_keys
from ivl_lightning.launch.sweep_search import violations

# Of these the agent needs its own, and a search on this machine has others.
_OF_AGENT = ("run_dir", "logger")
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True, slots=True)
class SweepFile:
    """What is searched.

    Attributes:
        name: of the file, without its ending.
        definition: as W&B's `sweeps` takes it; nested parameters have dotted names.
        arguments: of `train.py` that the file's `command` gives to every run.
    """

    name: str
    definition: dict[str, Any]
    arguments: tuple[str, ...]

    @property
    def metric(self) -> str:
        """Logged name of what is made best."""
        return str(self.definition["metric"]["name"])

    @property
    def maximize(self) -> bool:
        """Whether more of it is better."""
        return bool(self.definition["metric"].get("goal") == "maximize")

    @property
    def run_cap(self) -> int | None:
        """Most runs, by the file."""
        cap = self.definition.get("run_cap")
        return None if cap is None else int(cap)

    @property
    def is_grid(self) -> bool:
        """Whether it ends by itself."""
        return bool(self.definition["method"] == "grid")

    def is_reached(self, value: float) -> bool:
        """Whether a value of the metric is what the file calls its target."""
        target = self.definition["metric"].get("target")
        return target is not None and (value >= target if self.maximize else value <= target)


def read_sweep_file(name: str) -> SweepFile:
    """Read a sweep of `conf/sweep` by its name, or one's own by its path.

    Raises:
        ConfigError: there is none, or it says what neither W&B nor a run understands.
    """
    path = _find(name)
    try:
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"sweep={name}: {path} is no YAML: {error}") from error
    if not isinstance(definition, dict):
        raise ConfigError(f"sweep={name}: {path} holds no sweep; conf/sweep has examples")
    # What breaks the schema cannot be looked at more closely.
    if faults := violations(definition) or list(_faults(definition)):
        raise ConfigError("\n".join(f"sweep={name}: {fault}" for fault in faults))
    flat = {**definition, "parameters": dict(_unnested(definition["parameters"]))}
    check_keys([f"{key}=null" for key in flat["parameters"]])
    return SweepFile(path.stem, flat, tuple(_arguments(definition.get("command") or [])))


def _find(name: str) -> Path:
    shipped = Path(str(files("ivl_lightning.conf").joinpath("sweep")))
    for path in (shipped / f"{name}.yaml", Path(name).expanduser()):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
    raise ConfigError(f"sweep={name} is neither a file nor one of conf/sweep: {known}")


def _faults(definition: Mapping[str, Any]) -> Iterator[str]:
    """What the schema of W&B lets pass and a search here cannot do without."""
    if "metric" not in definition:
        yield "metric is missing: give metric: {name: val/loss, goal: minimize}, or another that is logged"
    cap = definition.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        yield f"run_cap={cap!r} must be a whole number of at least 1"
    if definition.get("method") == "custom":
        yield "method=custom is carried out by nobody here: use grid, random or bayes"
    for key, text in _texts(definition.get("parameters") or {}):
        if _EXPONENT.fullmatch(text):
            yield f"{key}: YAML reads {text} as text: write {_written_out(text)}"


def _texts(parameters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, spec in _unnested(parameters):
        values = [spec.get("value"), *(spec.get("values") or ())]
        yield from ((key, value) for value in values if isinstance(value, str))


def _written_out(text: str) -> str:
    """As YAML 1.1 reads a number: with a point, and the sign of its exponent."""
    mantissa, exponent = re.split("[eE]", text)
    point = "" if "." in mantissa else ".0"
    return f"{mantissa}{point}e{exponent if exponent[0] in '+-' else f'+{exponent}'}"


def _unnested(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    # `sweeps` does not find the points of a nested grid again that it has suggested before.
    for key, spec in parameters.items():
        if "parameters" in spec:
            yield from _unnested(spec["parameters"], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", spec


def _arguments(command: Sequence[object]) -> Iterator[str]:
    for argument in map(str, command):
        key = argument.partition("=")[0].lstrip("+")
        if "=" in argument and not argument.startswith("${") and key not in _OF_AGENT:
            yield argument
