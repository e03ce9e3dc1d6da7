"""What the pages say exists: settings, groups, targets, files, names, reasons."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from ivl_lightning.config import schema
from ivl_lightning.config.audit import AuditConfig
from ivl_lightning.config.chat import ChatConfig, ChatModel
from ivl_lightning.config.check import unknown_key
from ivl_lightning.config.convert import ConvertConfig, ExportConfig
from ivl_lightning.config.plan import PlanConfig
from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.data.exclusion import EXCLUDED

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = "model|data|stage|loss|preference|lora|optim|trainer|strategy|callbacks|logger|launcher|recipe|scaling"
# Made up in an example, for a file of the reader's own.
READERS_OWN = {"mine"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def load_generator() -> ModuleType:
    """docs/generate_config.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("generate_config", ROOT / "docs/generate_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
COMMANDS = [AuditConfig, PlanConfig, PreferencesConfig, ConvertConfig, ExportConfig, ChatConfig, ChatModel]
CLASSES = [*(kind for _, kind in inspect.getmembers(schema, dataclasses.is_dataclass)), *COMMANDS]


def test_the_settings_page_is_up_to_date() -> None:
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == GENERATOR.render(), (
        "run `python docs/generate_config.py`"
    )


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_setting_has_a_sentence(kind: type) -> None:
    sentences = GENERATOR.attribute_sentences(kind)
    assert set(sentences) == {field.name for field in dataclasses.fields(kind)}
    assert not [name for name, sentence in sentences.items() if not sentence.endswith(".")]


def test_every_class_of_settings_is_on_the_page() -> None:
    assert set(CLASSES) == set(GENERATOR.GROUPS.values())


def test_a_setting_without_a_sentence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Bare:
        """Settings.

        Attributes:
            told: has a sentence.
        """

        told: int = 0
        untold: int = 0

    monkeypatch.setattr(GENERATOR, "GROUPS", {"bare": Bare})
    with pytest.raises(ValueError, match=r"Bare\.untold has no sentence"):
        GENERATOR.render()


@pages
def test_settings_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(rf"(?<![\w/.])(?:{GROUPS})\.[a-z_0-9]+", page.read_text(encoding="utf-8")))
    faults = [unknown_key(name.split(".")) for name in sorted(named) if not name.endswith((".py", ".md", ".yaml"))]
    assert not [fault for fault in faults if fault]


@pages
def test_choices_that_are_named_exist(page: Path) -> None:
    choice = rf"(?<![\w.])({GROUPS})=([a-z0-9_]+(?:/[a-z0-9_]+)?)(?![\w*./])"
    named = set(re.findall(choice, page.read_text(encoding="utf-8")))
    missing = [(group, name) for group, name in named if not (ROOT / f"conf/{group}/{name}.yaml").is_file()]
    assert not [choice for choice in missing if choice[1] not in READERS_OWN]


@pages
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    code = re.findall(r"`(?:JOBS=\d )?make ([a-z]+)", page.read_text(encoding="utf-8"))
    assert set(code) <= set(targets)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pages
def test_python_examples_import_what_exists(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_reason_for_a_reject_is_explained() -> None:
    data = ROOT / "ivl_lightning/data"
    source = "\n".join(file.read_text(encoding="utf-8") for file in data.glob("*.py"))
    reasons = set(re.findall(r'\b(?:RowError|MediaError)\(\s*"([a-z_]+)"', source)) | {EXCLUDED}
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert {"over_length", "role_order", "path_escape"} <= reasons
    assert not [reason for reason in sorted(reasons) if f"`{reason}`" not in page]
