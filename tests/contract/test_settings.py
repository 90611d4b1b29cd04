"""Numbers out of their range, and errors that Pyro passes on: one sentence each."""

import math

import numpy as np
import pytest
import torch
from helpers.checks import linear_gaussian, small_vae
from torch import nn

import pyro_vae as pv
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.errors import ModelError, PyroVAEError, SettingsError

MISTAKES = {
    "a truth for a number of latents": lambda: pv.priors.StandardNormal(True),
    "a fraction of latents": lambda: pv.priors.Normal(2.0),
    "a word for the degrees of freedom": lambda: pv.priors.StudentT(3, df="a"),
    "no degrees of freedom": lambda: pv.priors.StudentT(3, df=math.nan),
    "a truth for a scale": lambda: pv.likelihoods.Normal(nn.Identity(), True),
    "a word for a rate": lambda: pv.posteriors.Refined(nn.Identity(), rate="fast"),
    "a number for hidden layers": lambda: pv.nn.mlp(3, 8, 2),
    "a width that is no whole number": lambda: pv.nn.mlp(3, [8.5], 2),
    "an input of no whole number": lambda: pv.nn.mlp(3.0, [8], 2),
    "a word for hidden layers": lambda: pv.nn.mlp(3, "ab", 2),
    "a number for hidden channels": lambda: pv.nn.conv_encoder((1, 7, 5), 8, 2),
    "channels that are no whole number": lambda: pv.nn.conv_decoder(3, [2.5], (1, 7, 5)),
    "particles that are no whole number": lambda: pv.log_evidence(linear_gaussian().as_vae(), x(), num_particles=2.5),
    "draws that are no whole number": lambda: pv.to_datatree(linear_gaussian().as_vae(), x(), draws=2.5),
}


def x():
    return torch.zeros(3, 5)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_number_out_of_its_range_is_refused_in_one_sentence(mistake):
    with pytest.raises(SettingsError, match="must be") as caught:
        MISTAKES[mistake]()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    assert whole("levels", np.int64(4), 2) == 4
    assert above_zero("scale", np.float32(0.5)) == 0.5
    with pytest.raises(SettingsError):
        above_zero("scale", 10**400)


def test_a_sentence_that_passes_through_pyro_is_still_one_line():
    """Pyro's trace raises an error anew with a table of shapes behind it."""
    vae = small_vae()
    vae.decoder.net = nn.Linear(3, 5).double()
    with pytest.raises(ModelError) as caught:
        pv.elbo.Trace_ELBO().loss(conditional().model, vae.guide, torch.zeros(2, 6).double())
    assert any("Trace Shapes" in str(argument) for argument in caught.value.args), "what is cut"
    assert str(caught.value) == "this prior needs a context; pass context="
    assert str(PyroVAEError("one\ntwo")) == r"one\ntwo"


def conditional():
    prior = pv.priors.ContextNormal(nn.Linear(2, 6)).double()
    return pv.VAE(prior=prior, decoder=small_vae().decoder, encoder=small_vae().encoder)


def test_what_a_comparison_says_of_a_refused_reference_is_one_line():
    """The hand-derived ELBO refuses the posterior where Pyro samples it."""
    vae = small_vae()
    vae.encoder = pv.posteriors.FullNormal(pv.nn.mlp(6, [8], pv.posteriors.FullNormal.outputs(3))).double()
    table = pv.compare_elbos(vae, torch.zeros(3, 6), {"STL": pv.elbo.STL()}, draws=2)
    texts = [value for value in table.attrs.values() if isinstance(value, str)]
    assert any("MultivariateNormal" in text for text in texts)
    assert all("\n" not in text for text in texts)
