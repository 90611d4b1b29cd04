"""``docs/architecture.md`` names the rooms, the layers and the test folders that there are."""

import re
import tomllib
from pathlib import Path

import pytest

import pyro_vae as pv

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pyro_vae"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = re.findall(r"^\| `([a-z]+)(?:\.py|/)` \|", PAGE, re.MULTILINE)
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def entries(folder):
    """Python files and folders with Python files, by name."""
    files = {path.stem for path in folder.glob("*.py")}
    return files | {path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))}


def layers(text):
    """The layers of a chain ``a ← b, c ← d``, the lowest first."""
    return [[room.strip(" .`") for room in layer.split(",")] for layer in text.replace("\n", " ").split("←")]


def linted(name):
    """The layers of a contract of import-linter, the lowest first."""
    contract = next(c for c in CONTRACTS if c.get("containers") == [name])
    return [[room.strip() for room in layer.split("|")] for layer in reversed(contract["layers"])]


def test_the_page_fits_one_screen():
    assert len(PAGE.splitlines()) <= 60


def test_the_rooms_of_the_page_are_those_of_the_package():
    assert len(ROOMS) == len(set(ROOMS)) <= 15
    assert set(ROOMS) == entries(PACKAGE) - {"__init__", "__about__", "__main__"}
    for room in ROOMS:
        assert f"`{room}{'.py' if (PACKAGE / f'{room}.py').exists() else '/'}`" in PAGE


def test_the_layers_of_the_page_are_those_that_are_linted():
    told = layers(re.search(r"^    (errors .*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)[1])
    assert [sorted(layer) for layer in told] == [sorted(layer) for layer in linted("pyro_vae")]
    assert [room for layer in told for room in layer] == ROOMS, "the order of the table"
    inside = layers(re.search(r"Inside `train`: (.*)\n", PAGE)[1])
    assert inside == linted("pyro_vae.train")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:pyro_vae|tests)/[\w/.]+)`", PAGE))))
def test_every_place_that_the_page_names_is_there(path):
    assert (ROOT / path).exists()


def test_every_room_says_what_is_in_it():
    for room in ROOMS:
        path = PACKAGE / room / "__init__.py" if (PACKAGE / room).is_dir() else PACKAGE / f"{room}.py"
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert re.fullmatch(r'""".*[.:](""")?', first) or first.endswith('"""'), f"{path}: {first}"


def test_tests_mirror_the_rooms():
    folders = entries(ROOT / "tests") - {"conftest"}
    rooms = {room for room in ROOMS if (PACKAGE / room).is_dir()}
    assert folders <= rooms | {"contract", "helpers"}
    assert not list((ROOT / "tests").glob("test_*.py")), "each test lies in a folder"


def test_paths_of_earlier_versions_go_on_working():
    import pyro_vae.callbacks
    import pyro_vae.swap
    from pyro_vae.callbacks import EarlyStopping
    from pyro_vae.cli import main
    from pyro_vae.compare import swap
    from pyro_vae.swap import rank
    from pyro_vae.train import per_datum_elbo

    assert pyro_vae.callbacks is pv.callbacks
    assert pyro_vae.swap is swap
    assert (EarlyStopping, rank) == (pv.train.callbacks.EarlyStopping, swap.rank)
    assert all(map(callable, (main, per_datum_elbo)))
