"""The code of the pages in ``docs/``."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str, language: str = "python") -> list[str]:
    """The blocks of code of a page, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def run(page: str, block: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """Run a block of a page on a copy of some names, and return these."""
    names = dict(names)
    exec(compile(block, f"docs/{page}.md", "exec"), names)
    return names


def rows(block: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a dict, as they stand in a file."""
    return eval("{" + block + "}", dict(names))
