"""What stands in the pages: code, files and commands, as their reader would copy them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PROGRAMS = r"(?:JOBS=\d+ )?(?:python train\.py|torchrun|ivl-[a-z]+|wandb sweep|make)\b"


class Block(NamedTuple):
    """A fenced block: its language, '' for commands and what they print, and its text."""

    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks in order; those within a list too."""
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        indent, language, text = match.groups()
        yield Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))


def lines_of_commands(page: Path) -> list[str]:
    """Every line of the page's blocks that is a command of this project's; lines that go on are joined."""
    text = "".join(block.text for block in blocks(page) if not block.language)
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    return [line for line in lines if re.match(_PROGRAMS, line)]


def commands(page: Path) -> list[list[str]]:
    """The page's commands as a shell splits them, those in sentences and tables too; remarks are gone."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(rf"`({_PROGRAMS}[^`]*)`", prose)
    return [_split(line.replace(r"\|", "|")) for line in [*lines_of_commands(page), *inline]]


def _split(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    end = next((place for place, word in enumerate(words) if word in ("|", "&&", ";")), len(words))
    return words[:end]


def write_files(page: Path, folder: Path) -> None:
    """Write the blocks that begin with a file's name, `# mine/own.py`, as that file below the folder."""
    for block in blocks(page):
        named = re.match(r"(?:# @package _global_\n)?# (mine/\S+\.(?:py|yaml))\n", block.text)
        if named:
            path = folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


def replaced(words: list[str], stand_ins: dict[str, object]) -> list[str]:
    """The words with names in capitals (`model.path=MODEL`) replaced."""
    pattern = "|".join(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])" for name in stand_ins)
    return [re.sub(pattern, lambda match: str(stand_ins[match[0]]), word) for word in words]
