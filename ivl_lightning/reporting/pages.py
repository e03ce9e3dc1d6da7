"""HTML pages from the templates of this folder; all of them wear the same style."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

_FOLDER = "ivl_lightning.reporting"


def render_page(template: str, **values: Any) -> str:
    """A page as text.

    Args:
        template: its file; it may include others of the folder.
        **values: what the template asks for; texts are escaped.
    """
    pages = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(**values)


def _source(name: str) -> str:
    return files(_FOLDER).joinpath(name).read_text(encoding="utf-8")
