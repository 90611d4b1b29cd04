"""The inventories of other libraries, by which the site's pages link to them, name objects that there are."""

import ast
import importlib

import pytest
from helpers.pages import DOCS

LINES = [
    pytest.param(*line.split(), id=line.split()[0])
    for path in sorted((DOCS / "inventories").glob("*.txt"))
    for line in path.read_text(encoding="utf-8").splitlines()[3:]
]


def found(name):
    """The object of a dotted name."""
    for cut in range(name.count(".") + 1, 0, -1):
        parts = name.split(".")
        try:
            place = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            place = getattr(place, part)
        return place
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize(("name", "kind", "page"), LINES)
def test_each_name_is_one_that_can_be_imported(name, kind, page):
    name = f"builtins.{name}" if page == "library/exceptions.html" else name
    assert isinstance(found(name), type) == (kind in ("class", "exception")) or name.startswith("collections.abc.")
    assert page.endswith(".html")


def test_the_names_of_annotations_lead_to_objects_of_the_inventories():
    links = ast.parse((DOCS / "_ext" / "links.py").read_text(encoding="utf-8"))
    (short,) = (node.value for node in links.body if isinstance(node, ast.Assign) and node.targets[0].id == "SHORT")
    listed = {param.id for param in LINES}
    assert set(ast.literal_eval(short).values()) <= listed
    assert len(listed) > 30
