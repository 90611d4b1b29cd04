"""Check the spelling of all prose: ``python docs/_ext/spelling.py``; exit code 1 if a word is unknown.

Prose is Markdown, the notebooks' text, docstrings and comments, without code, formulas and addresses. Words that the
dictionary lacks are listed in ``docs/words.txt``.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from spellchecker import SpellChecker

ROOT = Path(__file__).parents[2]
NOT_PROSE = re.compile(
    "|".join(
        [
            r"(?s:```.*?```)|`[^`]*`|^[ ]*>>>.*$",  # code
            r"(?s:\$\$.*?\$\$)|\$[^$]*\$|^[ ]*\.\. math::.*(?:\n[ ]+.*)*$",  # formulas
            r"<[^>]*>|https?://\S+|\]\([^)]*\)",  # addresses
            r":\w+:|\{[^}]*\}|^[ ]*\.\. .*$|^[ ]*(?:Args|Returns|Raises|Yields):$",  # marks of Sphinx
        ]
    ),
    re.MULTILINE,
)
WORD = re.compile(r"(?<![\w./_\\])[A-Za-z][a-z]+(?:['’][a-z]+)?(?![\w/_\\=(\[]|\.\w)")
GENERATED = ("docs/api/", "docs/notebooks/", "docs/measurements.md", "docs/project/bibliography.md")


def prose_of_code(text: str) -> Iterator[str]:
    """Return the docstrings and comments of a module, without doctests and formulas."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield re.split(r"\n\s*(?:Example|References):\n", ast.get_docstring(node) or "")[0]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# fmt:", "# noqa", "# type:")):
            yield token.string


def prose(path: Path) -> str:
    """Return the prose of a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return "\n".join(prose_of_code(text))
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return text


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; names in capitals and parts of code are left out."""
    return [word.lower().replace("’", "'").removesuffix("'s") for word in WORD.findall(NOT_PROSE.sub(" ", text))]


def main() -> int:
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/results/README.md"]
    files += [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/[a-z]*/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    files += ROOT.glob("pyro_vae/**/*.py")
    files = [path for path in files if not str(path.relative_to(ROOT)).startswith(GENERATED)]
    checker = SpellChecker()
    checker.word_frequency.load_words((ROOT / "docs/words.txt").read_text(encoding="utf-8").split())
    unknown = {path: sorted(checker.unknown(words(prose(path)))) for path in files}
    for path, found in unknown.items():
        if found:
            print(f"{path.relative_to(ROOT)}: {', '.join(found)}")
    return int(any(unknown.values()))


if __name__ == "__main__":
    sys.exit(main())
