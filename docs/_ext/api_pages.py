"""Write the pages of the API reference from the package's own lists of public names, one page for each room."""

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx

import pyro_vae

ROOMS = {
    "core": "The VAE",
    "nn": "Networks",
    "priors": "Priors",
    "likelihoods": "Likelihoods",
    "posteriors": "Posteriors",
    "data": "Data",
    "elbo": "ELBO estimators and objectives",
    "train": "Training, callbacks and checkpoints",
    "evidence": "Evidence and exact models",
    "compare": "Comparing estimators and models",
    "diagnose": "Diagnostics",
    "use": "Latents, imputations, samples and scores",
    "plots": "Figures",
    "errors": "Errors and warnings",
}
"""Rooms in the order of the reference, and their headings."""

SHORT = {"train": ["callbacks"], "evidence": ["evidence", "exact"], "compare": ["swap"], "use": ["sklearn"]}
"""Modules of a room that users reach by a short path, ``pyro_vae.<name>``, beside those of the room's own name."""


def public_names(module: ModuleType) -> list[str]:
    """Names that a module exports: those of ``__all__``, or else those that it defines itself."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def documented() -> dict[str, list[str]]:
    """The dotted public names of each room, without repetition."""
    found: dict[str, list[str]] = {}
    for room in ROOMS:
        names = [name for home, names in pyro_vae._HOMES.items() if home.split(".")[0] == room for name in names]
        dotted = [f"pyro_vae.{name}" for name in sorted(names, key=str.lower)]
        for short in SHORT.get(room, [room] if room in pyro_vae.__all__ else []):
            module = importlib.import_module(f"pyro_vae.{pyro_vae._MOVED.get(short, short)}")
            own = [name for name in public_names(module) if name not in names and not name.startswith("refuse_")]
            dotted += [f"pyro_vae.{short}.{name}" for name in own if callable(getattr(module, name))]
        found[room] = dotted
    return found


def first_paragraph(module: ModuleType) -> str:
    return (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ")


def room_page(room: str, names: list[str]) -> str:
    """A page of a room: what it is, and a table of its names."""
    title = ROOMS[room]
    about = first_paragraph(importlib.import_module(f"pyro_vae.{room}"))
    table = "\n".join(f"   ~{name}" for name in names)
    head = f"{title}\n{'=' * len(title)}\n\n{about}\n"
    return f"{head}\n.. autosummary::\n   :toctree: generated\n   :nosignatures:\n\n{table}\n"


def index_page(rooms: dict[str, list[str]]) -> str:
    """The first page of the reference."""
    listed = "\n".join(f"   {room}" for room in rooms)
    return (
        "API reference\n=============\n\nEvery public name of ``import pyro_vae as pv``, room by room.\n"
        f"\n.. toctree::\n   :maxdepth: 1\n\n{listed}\n"
    )


def write_if_changed(path: Path, text: str) -> None:
    """Leave files alone that are as they should be, so that Sphinx does not read them again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_pages(app: Sphinx, config: Any) -> None:
    rooms = documented()
    write_if_changed(Path(app.srcdir) / "api" / "index.rst", index_page(rooms))
    for room, names in rooms.items():
        write_if_changed(Path(app.srcdir) / "api" / f"{room}.rst", room_page(room, names))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
