"""Copy what lies outside docs/ to where Sphinx reads it: the notebooks, as they were run, and the measurements."""

import re
import shutil
from pathlib import Path
from typing import Any

from api_pages import write_if_changed
from sphinx.application import Sphinx

PAGE = """# Notebooks

Longer walks through the library, shown as they were run. They lie in the folder `notebooks/` of the repository.

```{{toctree}}
:maxdepth: 1
{names}
```
"""


def copy_notebooks(docs: Path) -> None:
    target = docs / "notebooks"
    target.mkdir(exist_ok=True)
    books = sorted((docs.parent / "notebooks").glob("*.ipynb"))
    for book in books:
        copied = target / book.name
        if not copied.exists() or copied.read_bytes() != book.read_bytes():
            shutil.copyfile(book, copied)
    write_if_changed(target / "index.md", PAGE.format(names="\n".join(book.stem for book in books)))


def copy_measurements(docs: Path) -> None:
    """The page of benchmarks/results, with its images found from here and its links to files as their names."""
    text = (docs.parent / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    text = text.replace("# Results", "# All measurements", 1)
    text = re.sub(r"(!\[[^\]]*\])\(([\w./]+)\)", r"\1(../benchmarks/results/\2)", text)
    text = re.sub(r"(?<!!)\[`?([^\]`]+)`?\]\((?!http)[\w./]+\)", r"`\1`", text)
    write_if_changed(docs / "measurements.md", text)


def copy_all(app: Sphinx, config: Any) -> None:
    copy_notebooks(Path(app.srcdir))
    copy_measurements(Path(app.srcdir))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", copy_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
