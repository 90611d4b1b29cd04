"""Write the bibliography from the references in the docstrings of public names, each with the members that cite it."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from api_pages import documented, write_if_changed
from sphinx.application import Sphinx

ENTRY = re.compile(r"\|\s*(?P<what>.*?\((?P<who>[^()]*?\d{4})\).*?),?\s*(?P<url>https?://\S+)")
"""A reference as docstrings write it: title (authors, year), section, address."""

HEAD = """# Bibliography

Every work that a docstring cites, by first author and year, with the members that cite it.

"""


def resolve(name: str) -> Any:
    """The object of a documented name, ``pyro_vae.<name>`` or ``pyro_vae.<module>.<name>``."""
    found = importlib.import_module("pyro_vae")
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def references(doc: str) -> list[tuple[str, str, str]]:
    """The authors and year, the line and the address of each reference of a docstring."""
    _, _, section = doc.partition("References:\n")
    section = re.split(r"\n\n", section)[0]
    joined = re.sub(r"\n\s+(?!\|)", " ", "\n" + section).replace("\n", " ")
    parts = ["|" + part for part in joined.split("|")[1:]]
    matches = [match for part in parts if (match := ENTRY.match(part))]
    return [(match["who"], " ".join(match["what"].split()), match["url"]) for match in matches]


def bibliography() -> str:
    cited: dict[str, tuple[str, str, list[str]]] = {}
    for name in [name for names in documented().values() for name in names]:
        for who, what, url in references(inspect.getdoc(resolve(name)) or ""):
            cited.setdefault(url, (who, what, []))[2].append(name)
    lines = []
    for url, (_, what, names) in sorted(cited.items(), key=lambda item: (item[1][0].lower(), item[0])):
        members = ", ".join(f"{{py:obj}}`~{name}`" for name in names)
        lines.append(f"- {what}. <{url}>\n  Cited by {members}.\n")
    return HEAD + "\n".join(lines)


def write_page(app: Sphinx, config: Any) -> None:
    write_if_changed(Path(app.srcdir) / "project" / "bibliography.md", bibliography())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", write_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
