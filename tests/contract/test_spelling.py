"""The spell checker of ``make lint`` reads all prose, and only prose."""

import importlib.util

import pytest
from test_site_code import ROOT

pytest.importorskip("spellchecker", reason="pyspellchecker comes with the extra lint")
spec = importlib.util.spec_from_file_location("spelling", ROOT / "docs" / "_ext" / "spelling.py")
spelling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(spelling)

TEXT = """A `misspeld` word of code.

.. math:: x \\frobnicate y
    \\also this

A sentense after a formula.

>>> this.is_kode
Held-owt data after a doctest, see https://exampel.org/adress.
"""


def test_prose_after_formulas_and_doctests_is_read_and_code_is_not():
    words = spelling.words(TEXT)
    assert {"sentense", "owt"} <= set(words)
    assert not {"misspeld", "frobnicate", "also", "kode", "exampel", "adress"} & set(words)


def test_docstrings_and_comments_of_a_module_are_read():
    found = " ".join(spelling.prose_of_code('"""A docstrng."""\nx = "a strng"  # a commnt\ny = 1  # fmt: skip\n'))
    assert {"docstrng", "commnt"} <= set(spelling.words(found))
    assert "strng" not in spelling.words(found)
