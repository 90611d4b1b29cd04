"""Every code block of the site runs, page by page, and what its pages name is there."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
from helpers.pages import DOCS

import pyro_vae as pv
from pyro_vae.cli import main

ROOT = DOCS.parent
GENERATED = {"_build", "_figures", "api", "notebooks", "jupyter_execute"}
WRITTEN = {"measurements.md", "project/bibliography.md"}
PAGES = {
    str(path.relative_to(DOCS)): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
    if path.relative_to(DOCS).parts[0] not in GENERATED and str(path.relative_to(DOCS)) not in WRITTEN
}
ELSEWHERE = {
    "adding_a_prior.md": "contract/test_docs.py",
    "adding_an_estimator.md": "elbo/test_adding_an_estimator.py",
    "adding_a_diagnostic.md": "diagnose/test_adding_a_diagnostic.py",
    "comparing_estimators.md": "contract/test_docs.py",
    "scaling.md": "contract/test_scaling_page.py",
}
"""Pages whose code other tests run, and which."""

LESS = {"fit": ["--epochs", "2"], "encode": [], "score": ["--num_particles", "50"], "explore": ["--draws", "5"]}
"""Flags behind those of a page, so that its commands take less long."""

BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OWN = set(PAGES) - {*ELSEWHERE, "tables.md"}  # whose commands tests/cli/test_real_tables.py runs on four tables
CODE = {page: BLOCK.findall(PAGES[page]) for page in sorted(OWN) if BLOCK.search(PAGES[page])}
SLOW = {"gallery.md", "performance.md"}  # a minute of figures, which `make docs` draws too; a compiled step


def run_commands(block: str) -> None:
    """Run the lines of a block that start with ``pyro-vae``."""
    for line in block.splitlines():
        if line.startswith("pyro-vae"):
            words = shlex.split(line)[1:]
            assert main([*words, *LESS[words[0]]]) == 0, line


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in CODE])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for language, block in CODE[page]:
        if language == "python":
            exec(compile(block, f"docs/{page}", "exec"), names)
        else:
            run_commands(block)


@pytest.mark.parametrize("page", sorted(ELSEWHERE))
def test_pages_that_are_run_elsewhere_are_named_there(page):
    assert Path(page).stem in (ROOT / "tests" / ELSEWHERE[page]).read_text(encoding="utf-8")


def reached(name: str) -> bool:
    """Whether ``pv.name`` leads somewhere."""
    found = pv
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found is not None


@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_names_of_a_page_are_there(page):
    text = PAGES[page]
    added = {"pv.priors.Logistic", "pv.elbo.TruncatedIWAE"}  # by the pages that add them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lost = {name for name in re.findall(r"\bpv(?:\.[A-Za-z_]\w*)+", text) if not reached(name)} - added
    assert not lost
    for path in re.findall(r"`((?:tests|pyro_vae|benchmarks|notebooks)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists() or page in ELSEWHERE, path
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in targets, target


def test_the_tests_that_pages_name_are_there():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for text in PAGES.values() for name in re.findall(r"`(test_\w+)`", text)}
    assert len(named) > 50
    assert not {name for name in named if f"def {name}(" not in tests}


def test_the_gallery_draws_every_figure():
    for name in set(pv.plots.__all__) - {"with_errors", "explore"}:  # which is a page, not a figure
        assert f"pv.plots.{name}(" in PAGES["gallery.md"], name
    assert len(re.findall(r"^!\[", PAGES["gallery.md"], re.MULTILINE)) >= 20
