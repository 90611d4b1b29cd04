"""Copy MathJax into the site from the package that carries it, so that pages load nothing from elsewhere."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx

PARTS = ("tex-chtml.js", "output/chtml", "input/tex/extensions")
"""What pages need: the component for TeX to HTML, its fonts, and TeX extensions that load on demand."""


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    spec = find_spec("sphinx-mathjax-offline")
    if error or spec is None or spec.origin is None:
        return
    source, target = Path(spec.origin).parent / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax"
    for part in PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / part, target / part)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
