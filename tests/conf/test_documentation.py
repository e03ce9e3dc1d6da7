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
from ivl_lightning.config.report import ReportConfig
from ivl_lightning.config.sweep import SweepConfig
from ivl_lightning.constants import STAGES
from ivl_lightning.data.exclusion import EXCLUDED
from tests.pages import PAGES, ROOT

GROUPS = (
    "model|data|stage|loss|preference|lora|optim|eval|trainer|strategy|callbacks|logger|launcher|recipe|scaling|"
    "objective"
)
# Made up in an example, for a file of the reader's own.
READERS_OWN = {"mine", "charts", "tiny_olmo"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def load_generator() -> ModuleType:
    """docs/generate_config.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("generate_config", ROOT / "docs/generate_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
COMMANDS = [
    AuditConfig,
    PlanConfig,
    SweepConfig,
    PreferencesConfig,
    ConvertConfig,
    ExportConfig,
    ReportConfig,
    ChatConfig,
    ChatModel,
]
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
    # In Python `model.lm_head` is no setting.
    text = re.sub(r"```python\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(rf"(?<![\w/.])(?:{GROUPS})\.[a-z_0-9]+", text))
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
    """Files are there, and so is the heading that a link names, by the rule of GitHub."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not leads_somewhere(page, link)]


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not heading or heading in anchors(target))


def anchors(page: Path) -> set[str]:
    """Names of a page's headings: lower case, blanks as hyphens, other signs left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_heading_that_is_not_there_is_noticed() -> None:
    page = ROOT / "docs/troubleshooting.md"
    assert leads_somewhere(page, "#logs-and-wb")
    assert not leads_somewhere(page, "#logs")
    assert not leads_somewhere(page, "nothing.md")


def test_every_page_is_linked() -> None:
    """From some other page, so that a reader can find it."""
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not link.startswith("#")
    }
    assert not [page for page in PAGES if page.resolve() not in linked and page != ROOT / "README.md"]


def test_every_stage_has_a_page() -> None:
    assert {page.stem for page in (ROOT / "docs/stages").glob("*.md")} == set(STAGES)


def texts_of_the_source() -> list[str]:
    """Every text in the source, with NUL for what is put into it."""
    files = [path for folder in ("ivl_lightning", "callbacks") for path in sorted((ROOT / folder).rglob("*.py"))]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    plain = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    made = [
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return [*(text for text in {*plain, *made} if " " in text), (ROOT / "Makefile").read_text(encoding="utf-8")]


def test_messages_that_are_quoted_exist() -> None:
    """docs/troubleshooting.md: first column of the tables of messages, where `...` stands for anything."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| message \|.*\n\|---.*\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    cells = [line.split(" | ")[0] for table in tables for line in table.splitlines()]
    quotes = [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]
    assert len(quotes) > 40
    source = texts_of_the_source()
    assert not [quote for quote in quotes if not any(has_in_order(text, quote.split("...")) for text in source)]
    assert not any(has_in_order(text, ["recipe=", " has no numbers of model="]) for text in source)


def has_in_order(text: str, pieces: list[str]) -> bool:
    place = 0
    for piece in map(str.strip, pieces):
        place = text.find(piece, place)
        if place < 0:
            return False
    return True


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
