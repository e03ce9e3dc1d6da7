"""JSON as this project writes it: UTF-8, one entry a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def to_json(content: Mapping[str, object], indent: int | None = 2) -> str:
    """Text of an object, with a line end."""
    return json.dumps(content, ensure_ascii=False, indent=indent) + "\n"


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Write an object; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_json(content), encoding="utf-8")
