"""Writes docs/config.md from the settings' dataclasses: `python docs/generate_config.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ivl_lightning.config import schema
from ivl_lightning.config.audit import AuditConfig
from ivl_lightning.config.chat import ChatConfig, ChatModel
from ivl_lightning.config.convert import ConvertConfig, ExportConfig
from ivl_lightning.config.plan import PlanConfig
from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.config.report import ReportConfig
from ivl_lightning.config.sweep import SweepConfig

TARGET = Path(__file__).with_name("config.md")

# Key in train.yaml -> its dataclass, in the order of the page.
GROUPS: dict[str, type] = {
    "": schema.RunConfig,
    "model": schema.ModelConfig,
    "data": schema.DataConfig,
    "data.prepare": schema.PrepareConfig,
    "stage": schema.StageConfig,
    "loss": schema.LossConfig,
    "preference": schema.PreferenceConfig,
    "lora": schema.LoraSettings,
    "optim": schema.OptimConfig,
    "eval": schema.EvalConfig,
    "trainer": schema.TrainerConfig,
    "strategy": schema.StrategyConfig,
    "launcher": schema.LauncherConfig,
    "scaling": schema.ScalingConfig,
    "objective": schema.ObjectiveConfig,
    "recipe": schema.RecipeConfig,
    "ivl-audit": AuditConfig,
    "ivl-plan plan": PlanConfig,
    "ivl-sweep": SweepConfig,
    "ivl-preferences": PreferencesConfig,
    "ivl-convert": ConvertConfig,
    "ivl-export": ExportConfig,
    "ivl-report": ReportConfig,
    "ivl-chat": ChatConfig,
    "ivl-chat model": ChatModel,
}

HEADER = """\
# Settings

<!-- Written by `python docs/generate_config.py` from ivl_lightning/config/; do not edit. -->

Every setting, its type, its default and what it means. Give them on the command line (`data.max_tiles=6`), for one
stage of a run (`recipe.stages.mlp_warmup.optim.lr=1e-4`), or in a config file of your own. A misspelt setting and a
value of another type are errors, never ignored.

The defaults are those of the dataclasses in `ivl_lightning/config/schema.py`. Files in `conf/` may give others;
`python train.py --cfg job` shows what holds for a command.
"""


def render() -> str:
    """The text of docs/config.md.

    Raises:
        ValueError: a setting without a sentence in its class's docstring; names it.
    """
    return "\n".join([HEADER, *(line for key, kind in GROUPS.items() for line in _section(key, kind))])


def _section(key: str, kind: type) -> Iterator[str]:
    sentences = attribute_sentences(kind)
    hints = get_type_hints(kind)
    title = f"`{key}`" if key else "The run"
    yield f"## {title}\n"
    yield f"{inspect.cleandoc(kind.__doc__ or '').splitlines()[0]}\n"
    yield "| setting | type | default | meaning |"
    yield "|---|---|---|---|"
    for field in dataclasses.fields(kind):
        if field.name not in sentences:
            raise ValueError(f"{kind.__name__}.{field.name} has no sentence under Attributes in its class's docstring")
        # A command of its own has its settings at the top.
        group = key.partition(" ")[2] if key.startswith("ivl-") else key
        name = f"{group}.{field.name}" if group else field.name
        cells = (f"`{name}`", type_name(hints[field.name]), _default(field), sentences[field.name])
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def attribute_sentences(kind: type) -> dict[str, str]:
    """Field name -> its sentence, from the docstring's Attributes and those of parents; `a, b: text` serves both."""
    found: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__):
        found |= _own_sentences(ancestor)
    return found


def _own_sentences(kind: type) -> dict[str, str]:
    _, _, block = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        entry = re.fullmatch(r" {4}(\w+(?:, \w+)*): (.+)", line)
        if entry:
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif line.startswith(" " * 8):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
        else:
            names = []
    return found


def type_name(hint: Any) -> str:
    """A type as a reader of the page understands it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of ({type_name(arguments[1])})"
    if dataclasses.is_dataclass(hint):
        return f"`{hint.__name__}`"
    names = {str: "text", bool: "true or false", int: "whole number", float: "number", type(None): "null"}
    return names.get(hint, "anything")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return "see below"
    return f"`{_literal(value)}`"


def _literal(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
