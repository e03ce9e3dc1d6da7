"""Files that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ivl_lightning.whole_files import whole_file


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """An object on several lines, for people too."""
    with whole_file(path) as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_line(file: TextIO, row: Mapping[str, Any]) -> None:
    """A row of a JSON-lines file."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
