"""The code of the docs runs as it stands, and what it adds keeps the contract."""

import re
from functools import partial

import pyro.distributions as dist
import pytest
import test_members
import test_oracle_densities
import torch
from helpers import members, reference_densities
from helpers.pages import DOCS, blocks, rows, run, text_of
from test_readme import MEMBERS

import pyro_vae as pv

PAGES = ("adding_a_prior", "adding_an_estimator", "adding_a_diagnostic")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_three_files_and_fits_two_screens(page):
    text = text_of(page)
    assert len(text.splitlines()) <= 120
    headings = re.findall(r"^## \d\. .* `(.*?)`", text, re.MULTILINE)
    assert len(headings) == 3, "the files to touch"
    assert all((DOCS.parent / name).parent.is_dir() for name in headings)
    assert headings[2] == "docs/members.md"


@pytest.mark.parametrize("page", PAGES)
def test_a_row_of_a_page_is_one_of_the_table_of_members(page):
    (row,) = blocks(page, "markdown")
    header = next(line for line in MEMBERS.splitlines() if line.startswith("| | member"))
    assert row.strip().replace("\\|", "").count("|") == header.count("|")


# --- A prior ---


@pytest.fixture
def added(monkeypatch):
    """The class in ``pyro_vae.priors`` and its row in the table, for the time of a test."""
    of_class, of_density, of_row = blocks("adding_a_prior")
    names = run("adding_a_prior", of_class, vars(pv.priors))
    monkeypatch.setattr(pv.priors, "Logistic", names["Logistic"], raising=False)
    names = run("adding_a_prior", of_density, vars(reference_densities))
    for name, row in rows(of_row, names).items():
        monkeypatch.setitem(reference_densities.PRIORS, name, row)
        monkeypatch.setitem(members.PRIORS, name, partial(members.prior, name, row))
        monkeypatch.setitem(test_oracle_densities.PRIORS, name, partial(test_oracle_densities.plain, name))
        monkeypatch.setitem(test_members.MEMBERS, f"prior {name}", members.PRIORS[name])
    monkeypatch.setattr(test_members, "SMOOTH", [*test_members.SMOOTH, "prior Logistic"])


def test_without_its_row_the_new_member_is_missed(added, monkeypatch):
    monkeypatch.delitem(members.PRIORS, "Logistic")
    with pytest.raises(AssertionError):
        test_members.test_the_table_covers_every_exported_member(pv.priors, members.PRIORS)


def test_the_new_prior_keeps_the_contract(added):
    test_members.test_the_table_covers_every_exported_member(pv.priors, members.PRIORS)
    for batch in test_members.BATCHES:
        test_members.test_shapes("prior Logistic", batch)
    for contract in (
        test_members.test_the_density_integrates_to_one,
        test_members.test_samples_agree_with_the_density,
        test_members.test_a_gradient_reaches_every_parameter,
        test_members.test_saved_and_loaded_it_is_the_same,
        test_members.test_its_repr_names_it,
    ):
        torch.manual_seed(0)
        contract("prior Logistic")
    test_oracle_densities.test_a_priors_log_density("Logistic")
    test_oracle_densities.test_a_priors_samples_have_its_density("Logistic")


def test_the_new_prior_trains_and_is_described(added, capsys):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.Logistic(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 5)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 4)),
    )
    assert pv.describe(vae).attrs["kl"] == "Monte Carlo"
    assert "Logistic" in capsys.readouterr().out
    history = pv.fit(vae, torch.randn(100, 5), epochs=10, progress=False, device="cpu").history
    assert history.train_elbo[-1] > history.train_elbo[0]
    assert vae.prior().log_prob(torch.zeros(2)).isfinite()
    assert isinstance(vae.prior().base_dist, dist.Logistic)


def test_the_page_on_comparing_estimators_runs(capsys):
    page, names = text_of("comparing_estimators"), {}
    for snippet in blocks("comparing_estimators"):
        names = run("comparing_estimators", snippet, names)
    assert "Train with" in capsys.readouterr().out
    pair = names["pair"]
    assert pair.parameter_group.values.tolist() == ["all", "Θ", "φ", "decode", "encode"]
    assert (pair.elbo.sel(estimator="IWAE", particles=8) > pair.elbo.sel(estimator="ELBO", particles=8)).item()
    stated = set(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE))
    assert {name for cell in stated for name in re.findall(r"`(\w+)`", cell)} <= set(pair.data_vars)
