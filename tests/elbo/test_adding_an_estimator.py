"""The code of ``docs/adding_an_estimator.md`` runs as it stands, and what it adds keeps the contract."""

from functools import partial

import pytest
import test_estimators
import test_nesting
import test_random_networks
import torch
from helpers import members, reference_bounds
from helpers.pages import blocks, rows, run

import pyro_vae as pv
from pyro_vae.elbo import importance_weighted


@pytest.fixture
def estimator(monkeypatch):
    """The class in ``pyro_vae.elbo`` and its row in the table, for the time of a test."""
    of_class, of_formula, of_row, _ = blocks("adding_an_estimator")
    names = run("adding_an_estimator", of_class, vars(importance_weighted))
    monkeypatch.setattr(pv.elbo, "TruncatedIWAE", names["TruncatedIWAE"], raising=False)
    names = run("adding_an_estimator", of_formula, vars(reference_bounds))
    ((name, row),) = rows(of_row, names).items()
    monkeypatch.setitem(reference_bounds.ESTIMATORS, name, row)
    monkeypatch.setitem(members.ESTIMATORS, name, partial(members.estimator, name, row))
    return name


@pytest.mark.parametrize("objective", ["none", *members.OBJECTIVES])
def test_the_new_estimator_is_its_formula_inside_each_objective(estimator, objective):
    test_nesting.test_every_pair_is_the_reference_in_value_and_gradient(objective, estimator)


@pytest.mark.parametrize("objective", ["alone", "Beta of FreeBits"])
def test_the_new_estimator_is_its_formula_with_two_latents_and_dropout(estimator, objective):
    test_random_networks.test_two_latents_with_dropout_are_the_reference_in_value_and_gradient(
        objective, estimator, training=True
    )


def test_the_new_estimator_keeps_the_contract(estimator):
    test_estimators.test_at_the_exact_posterior_every_bound_is_the_evidence(estimator)
    test_estimators.test_minibatches_are_unbiased(estimator)
    test_estimators.test_svi_takes_it_and_learns(estimator)
    test_estimators.test_no_step_waits_for_the_device(estimator)


def test_the_new_estimator_truncates():
    """Power of the tests above: in three draws as different as theirs some weights are cut."""
    log_w = torch.tensor([[0.0], [1.0], [4.0]]).double()
    formula = run("adding_an_estimator", blocks("adding_an_estimator")[1], vars(reference_bounds))["truncated_iwae"]
    assert formula(log_w, 1.0).value < reference_bounds.iwae(log_w, 1.0).value - 0.1


def test_the_new_estimator_gives_what_its_page_says(estimator):
    names = run("adding_an_estimator", blocks("adding_an_estimator")[-1], {})
    assert abs(names["one"] - names["exact"]) < 0.1
    assert 0 < names["many"] < names["few"] < names["exact"]
