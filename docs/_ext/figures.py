"""Run the code of the gallery and save the figure of each block under the name of the image behind it."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from sphinx.application import Sphinx

BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n!\[[^\]]*\]\(_figures/([\w.]+)\))?", re.DOTALL | re.MULTILINE)
"""A block of code, and the image that follows it, if one does."""


def fingerprint(page: Path) -> str:
    """A hash of the page and of the package: figures are drawn anew where either has changed."""
    sources = sorted((page.parent.parent / "pyro_vae").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in [page, *sources])).hexdigest()


def draw(page: Path, folder: Path) -> None:
    """Run all blocks of a page in one namespace, and save ``figure`` after each block that has an image."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names: dict[str, Any] = {}
    folder.mkdir(exist_ok=True)
    for code, image in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, page.name, "exec"), names)
        if image:
            names.pop("figure").savefig(folder / image, dpi=110, bbox_inches="tight")
    torch.set_num_threads(threads)


def draw_if_changed(app: Sphinx, config: Any) -> None:
    page = Path(app.srcdir) / "gallery.md"
    folder = page.parent / "_figures"
    stamp, now = folder / "fingerprint", fingerprint(page)
    if not stamp.exists() or stamp.read_text() != now:
        draw(page, folder)
        stamp.write_text(now)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", draw_if_changed)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
