"""The package, the README, the site and the notebooks avoid phrases that read as translated."""

import json
import re

import pytest
from test_site_code import PAGES, ROOT

PHRASES = (
    r"nobody knows",
    r"(goes|go|gone) on with",
    r"(is|was) begun by",
    r"\bis too many\b",
    r"is gone: the one",
    r"is to be told",
    r"\b(is|are|be) had\b",
    r"is no [\w.]+; derive it",
    r"\bbe sought\b",
    r"not the same to the bit",
    r"who has looked at",
    r"come to rest",
    r"looks on while",
    r"\bso many\b",
    r"what stands on this page",
)


def markdown(path):
    """The prose of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


TEXTS = {f"docs/{page}": text for page, text in PAGES.items()}
TEXTS |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md")}
TEXTS |= {path.name: markdown(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
TEXTS |= {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted((ROOT / "pyro_vae").rglob("*.py"))}


def found(text):
    return [match[0] for phrase in PHRASES for match in re.finditer(phrase, text)]


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_avoids_phrases_that_read_as_translated(name):
    assert not found(TEXTS[name])


def test_a_planted_phrase_is_found():
    assert found("It was begun by two and is gone on with by three.") == ["gone on with", "was begun by"]
