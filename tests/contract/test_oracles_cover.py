"""Every exported member has a second implementation, and that implementation is independent."""

import ast
from pathlib import Path

import helpers
import pytest
import test_oracle_densities as densities
import test_oracle_elbos as elbos
import test_oracle_likelihoods as likelihoods
from helpers.members import BASES, exported

import pyro_vae as pv

NOT_ESTIMATORS = {"Estimator", "Schedule", "Weights"}
OF_CLASSES = {"M2"}
"""Whose oracle is a mixture of models: tests/elbo/test_classes.py has it."""
FUNCTIONS = {"note_objective"}
"""Estimators of ``pyro_vae.elbo`` that are no classes."""


@pytest.mark.parametrize(
    ("module", "covered"),
    [
        (pv.priors, densities.COVERED_PRIORS),
        (pv.posteriors, densities.COVERED_POSTERIORS),
        (pv.likelihoods, likelihoods.COVERED),
        (pv.elbo, elbos.COVERED - FUNCTIONS),
    ],
    ids=["priors", "posteriors", "likelihoods", "elbo"],
)
def test_every_exported_member_has_an_oracle(module, covered):
    assert exported(module) - BASES - NOT_ESTIMATORS - OF_CLASSES == covered


def test_the_estimators_that_are_functions_have_one():
    assert elbos.COVERED & set(pv.elbo.__all__) >= FUNCTIONS


@pytest.mark.parametrize(
    "path", sorted(Path(helpers.__file__).parent.glob("reference_*.py")), ids=lambda path: path.stem
)
def test_a_reference_imports_neither_the_library_nor_pyro(path):
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= {
        "collections", "dataclasses", "functools", "helpers", "itertools", "math", "mpmath", "numpy", "torch", "typing",
    }  # fmt: skip
    assert "torch.distributions" not in path.read_text(encoding="utf-8")
