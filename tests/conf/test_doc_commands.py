"""Every command that the pages show: it exists, its settings exist, and their values are of the right type."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.types import Override
from pydantic import TypeAdapter, ValidationError

from ivl_lightning.cli.chat import as_text
from ivl_lightning.config.audit import AuditConfig
from ivl_lightning.config.chat import ChatConfig
from ivl_lightning.config.convert import ConvertConfig, ExportConfig
from ivl_lightning.config.plan import PlanConfig
from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.config.report import ReportConfig
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.config.sweep import SweepConfig
from ivl_lightning.launch.compose import compose_stage, stage_names
from ivl_lightning.launch.overrides import GROUPS, check_keys, complete, literal, parse
from tests.pages import PAGES, ROOT, commands

CONF = ROOT / "conf"
# Made up in an example, for a file of the reader's own.
OWN_FILES = {"mine", "charts", "tiny_olmo", "my.yaml"}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
OTHERS = {
    "ivl-audit": AuditConfig,
    "ivl-preferences": PreferencesConfig,
    "ivl-convert": ConvertConfig,
    "ivl-export": ExportConfig,
    "ivl-report": ReportConfig,
    "ivl-chat": ChatConfig,
}
"""Commands with settings of their own."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_commands_are_understood(page: Path) -> None:
    assert not [f"{' '.join(words)}: {fault}" for words in commands(page) for fault in faults_of(words)]


def test_enough_commands_are_found() -> None:
    """Whoever breaks the search shall notice: README, the list of commands and the generated pages are full of them."""
    found = {page.name: len(commands(page)) for page in PAGES}
    assert found["README.md"] >= 8
    assert found["commands.md"] >= 18
    assert found["internvl2_5_8b.md"] == 5
    assert sum(found.values()) > 200


def trainings(page: Path) -> list[list[str]]:
    """Arguments of the page's trainings, of a multirun those of its first job; without those that are not told
    whole (`...`), or choose files of the reader's own."""
    told = [words for words in commands(page) if words[0] in ("python", "torchrun")]
    told = [words for words in told if not {"...", "--config-dir"} & set(words)]
    # How a sweeper searches is Hydra's, and that of Optuna an extra.
    given = [[word for word in arguments_of(words) if not word.startswith("hydra")] for words in told]
    found = [[_first_value(argument) for argument in arguments] for arguments in given]
    return [arguments for arguments in found if not any(map(_chooses_own, arguments))]


def composed(arguments: list[str], *, every: bool) -> list[RunConfig]:
    """Configurations of the last stage of a command, or of every stage, as `train.py` composes them."""
    recipes = [path.stem for path in (CONF / "recipe").glob("*.yaml")]
    arguments = complete(arguments, recipes)
    if not any(argument.startswith("data.meta=") for argument in arguments):
        arguments.append("data.meta=META")
    whole = compose("train", overrides=arguments)
    names = stage_names(whole.stages, list(whole.recipe.stages))
    chosen = names if every else names[-1:]
    return [compose_stage(name, arguments, run_dir="RUN", recipe=whole.recipe) for name in chosen]


def test_the_first_commands_compose() -> None:
    """The settings that hold for the last stage of each command of the README, without contradictions."""
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        names = [composed(arguments, every=False)[0].recipe.name for arguments in trainings(ROOT / "README.md")]
    assert names == ["none", "miniature_quick"]


@pytest.mark.soak
@pages
def test_every_command_composes(page: Path) -> None:
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        for arguments in trainings(page):
            assert composed(arguments, every=True), arguments


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["make", "nothing"], "no target"),
        (["ivl-nothing"], "no command"),
        (["ivl-chat", "model.pathh=M"], "pathh"),
        (["ivl-export", "run=R", "target=T", "shard_gb=big"], "shard_gb"),
        (["python", "train.py", "optim.lrr=1"], "lrr is not a setting"),
        (["python", "train.py", "optim.lr=fast"], "optim.lr='fast'"),
        (["python", "train.py", "trainer.max_steps=1.5"], "trainer.max_steps"),
        (["python", "train.py", "strategy=zero3"], "strategy/zero3"),
        (["ivl-plan", "plan.gpu=v100"], "plan.gpu"),
        (["wandb", "sweep", "conf/sweep/nothing.yaml"], "no file"),
    ],
)
def test_faults_are_seen(words: list[str], message: str) -> None:
    assert message in "\n".join(faults_of(words))


def _first_value(argument: str) -> str:
    """`optim.lr=1e-5,2e-5` -> `optim.lr=1e-5`."""
    (override,) = parse([argument])
    if not override.is_sweep_override():
        return argument
    value = _values(override)[0]
    return f"{override.key_or_group}={value if override.key_or_group in GROUPS else literal(value)}"


def faults_of(words: list[str]) -> Iterator[str]:
    """What keeps a command from being started."""
    words = words[1:] if words[0].startswith("JOBS=") else words
    if words[0] == "make":
        yield from (f"no target {word}" for word in words[1:] if word.isalpha() and word not in TARGETS)
    elif words[0] == "wandb":
        yield from (f"no file {word}" for word in words[2:] if word.endswith(".yaml") and not (ROOT / word).is_file())
    elif words[0].startswith("ivl-") and words[0] not in SCRIPTS:
        yield f"no command {words[0]}"
    elif words[0] in OTHERS:
        arguments = [as_text(word) for word in words[1:]] if words[0] == "ivl-chat" else words[1:]
        yield from _typed(arguments, OTHERS[words[0]])
    else:
        yield from _faults_of_training(arguments_of(words))


def arguments_of(words: list[str]) -> list[str]:
    """What stands behind the program and what starts it; a flag that has a value loses both."""
    start = words.index("train.py") + 1 if "train.py" in words else 1
    rest = words[start:]
    if "--config-dir" in rest:
        place = rest.index("--config-dir")
        rest = [*rest[:place], *rest[place + 2 :]]
    return [word for word in rest if "=" in word and not word.startswith("-")]


def _faults_of_training(arguments: list[str]) -> Iterator[str]:
    plan = [word.removeprefix("plan.") for word in arguments if word.startswith("plan.")]
    own = [word for word in arguments if word.startswith(("sweep=", "count="))]
    yield from (f"plan.{fault}" for fault in _typed(plan, PlanConfig))
    yield from _typed(own, SweepConfig)
    rest = [word for word in arguments if word not in own and not word.startswith("plan.")]
    try:
        check_keys(rest)
    except ValueError as error:
        yield str(error)
        return
    for override in parse(rest):
        yield from _fault_of_value(override)


def _typed(arguments: list[str], kind: type) -> Iterator[str]:
    for override in parse(arguments):
        yield from _fault_of_value(override, kind)


def _fault_of_value(override: Override, kind: type = RunConfig) -> Iterator[str]:
    key, values = override.key_or_group, _values(override)
    if key.startswith("hydra") or override.is_delete():
        return
    if key in GROUPS:
        names = [name for value in values for name in (value if isinstance(value, list) else [value])]
        missing = [name for name in names if not _is_own(name) and not (CONF / f"{key}/{name}.yaml").is_file()]
        yield from (f"conf/{key}/{name}.yaml is not there" for name in missing)
        return
    path = key.split(".")
    field = _field(kind, path[3:] if path[:2] == ["recipe", "stages"] else path)
    if field is None:
        yield f"{key} is no setting of {kind.__name__}"
        return
    for value in values:
        try:
            # Names in capitals and made-up texts stand for whatever fits.
            TypeAdapter(field).validate_python(value, strict=not isinstance(value, int))
        except ValidationError as error:
            yield f"{key}={value!r}: {error.errors()[0]['msg']}"


def _chooses_own(argument: str) -> bool:
    group, _, choice = argument.partition("=")
    return group in GROUPS and _is_own(choice)


def _is_own(name: str) -> bool:
    """Whether a file is the reader's: one that an example makes up, or a name in capitals."""
    return name in OWN_FILES or name.isupper()


def _values(override: Override) -> list[Any]:
    """The value, or those of a multirun; of an interval its ends."""
    if override.is_interval_sweep():
        return [override.value().start, override.value().end]
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    return [override.value()]


def _field(kind: Any, path: list[str]) -> Any:
    """The type of a setting; None where there is none, Any below a mapping."""
    for key in path:
        kind = next((option for option in (kind, *get_args(kind)) if is_dataclass(option)), kind)
        if not is_dataclass(kind):
            return Any
        if key not in {field.name for field in fields(kind)}:
            return None
        kind = get_type_hints(kind)[key]
    return kind
