"""Densities at atoms are no comparison: ``compare_models`` and ``rank`` warn of them."""

import warnings

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.compare.models import judge_models
from pyro_vae.compare.swap import rank
from pyro_vae.data import Data
from pyro_vae.errors import AtomsWarning

torch.manual_seed(0)
EXACT = pv.exact.LinearGaussian(torch.randn(4, 1), torch.zeros(4), 0.5)
OTHER = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.9)
MODELS = {"a": EXACT.as_vae(), "b": OTHER.as_vae()}


def half_zero():
    x = EXACT.sample(40)
    x[:20, 2] = 0
    return x


@pytest.mark.parametrize("compared", [pv.compare_models, rank])
def test_a_density_at_an_atom_is_warned_of(compared):
    with pytest.warns(AtomsWarning, match=r"1 of 4 features .* \(first: feature 2, 0 in 50 %\)") as warned:
        found = compared(MODELS, half_zero(), num_particles=5)
    assert "feature 2" in found.attrs["atoms"]
    assert warned[0].filename == __file__, "the line of the user"
    told = str(found) if compared is pv.compare_models else found.attrs["caution"]
    assert "reflects how narrow a model is there, not how well it describes the data" in " ".join(told.split())


def test_it_is_no_comparison_and_names_the_column():
    named = Data(half_zero(), columns=["a", "b", "grey", "d"])
    with pytest.warns(AtomsWarning, match="first: grey"):
        found = judge_models(pv.compare_models(MODELS, named, num_particles=5))
    assert found.level == "bad"
    assert "dequantize" in found.next


def test_noise_takes_the_atom_away_and_rounding_is_none():
    x = half_zero()
    spread, rounded = x + 0.1 * torch.rand(x.shape), (5 * EXACT.sample(200)).round() / 5
    assert max(np.unique(column, return_counts=True)[1].max() for column in rounded.T) > 15
    with warnings.catch_warnings():
        warnings.simplefilter("error", AtomsWarning)
        assert judge_models(pv.compare_models(MODELS, spread, num_particles=5)).level != "bad"
        pv.compare_models(MODELS, rounded, num_particles=5)


def test_probabilities_may_have_atoms():
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((40, 4), 0.2))
    models = {}
    for name in ("a", "b"):
        decoder = pv.likelihoods.Poisson(torch.nn.Linear(1, 4))
        encoder = pv.posteriors.DiagNormal(torch.nn.Linear(4, 2))
        models[name] = pv.VAE(prior=pv.priors.StandardNormal(1), decoder=decoder, encoder=encoder)
    assert pv.compare_models(models, counts, num_particles=5).attrs["atoms"] == ""
