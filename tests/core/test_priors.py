"""Priors against scipy at random parameters, and what they refuse."""

import math

import numpy as np
import pytest
import torch
import zuko
from helpers.checks import normal_log_density, small_vae, z_score
from scipy import special, stats
from torch import nn

import pyro_vae as pv
from pyro_vae.data import Data, mask_nan
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.train import per_datum_elbo


def randomized(prior):
    """The prior with parameters drawn at random, in double precision."""
    prior = prior.double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return prior


def mixture(prior, z):
    """Σ_k π_k N(z | m_k, s_k²), each component by scipy."""
    loc, scale = prior.loc.detach().numpy(), prior.log_scale.detach().exp().numpy()
    logs = stats.norm.logpdf(z.numpy()[:, None], loc, scale).sum(-1)
    return special.logsumexp(logs + special.log_softmax(prior.logits.detach().numpy()), axis=-1)


def located(law):
    return lambda prior, z: law(z, prior.loc.detach().numpy(), prior.log_scale.detach().exp().numpy()).sum(-1)


LAWS = {
    "Normal": (pv.priors.Normal, located(stats.norm.logpdf)),
    "Laplace": (pv.priors.Laplace, located(stats.laplace.logpdf)),
    "StudentT": (
        lambda d: pv.priors.StudentT(d, df=3.5),
        located(lambda z, loc, scale: stats.t.logpdf(z, 3.5, loc, scale)),
    ),
    "GaussianMixture": (lambda d: pv.priors.GaussianMixture(d, components=4), mixture),
}


@pytest.mark.parametrize("law", LAWS)
def test_a_prior_at_random_parameters_is_scipys(law):
    make, truth = LAWS[law]
    prior, z = randomized(make(3)), torch.randn(7, 3).double()
    found = prior().log_prob(z).detach().numpy()
    assert found == pytest.approx(truth(prior, z), rel=1e-12)
    start = make(3).double()
    if law != "GaussianMixture":  # whose locations start at random
        assert not np.allclose(found, start().log_prob(z).detach().numpy()), "power: the parameters matter"


def test_a_normal_that_depends_on_the_context_is_scipys():
    prior = randomized(pv.priors.ContextNormal(nn.Linear(2, 6)))
    z, context = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    loc, log_scale = prior.net(context).detach().numpy().reshape(7, 2, 3).transpose(1, 0, 2)
    truth = stats.norm.logpdf(z, loc, np.exp(log_scale)).sum(-1)
    assert prior(context).log_prob(z).detach().numpy() == pytest.approx(truth, rel=1e-12)


# --- VampPrior ---


def vamp_vae(data, components=3, *, contexts=0, encoder=None):
    encoder = pv.posteriors.DiagNormal(pv.nn.mlp(6 + contexts, [8], 6)) if encoder is None else encoder
    decoder = pv.likelihoods.Normal(pv.nn.mlp(3 + contexts, [8], 6), scale=0.7)
    return pv.VAE(prior=pv.priors.VampPrior(data, components=components), decoder=decoder, encoder=encoder)


def test_every_pseudo_input_starts_as_a_row_drawn_at_random():
    x = torch.randn(50, 6)
    chosen = []
    for seed in range(3):
        torch.manual_seed(seed)
        start = pv.priors.VampPrior(x, components=10).pseudo_inputs
        rows = (start[:, None] == x).all(-1)
        assert (rows.sum(1) == 1).all(), "each is a row"
        chosen.append(tuple(rows.int().argmax(1).tolist()))
        assert len(set(chosen[-1])) == 10, "another one each"
    assert len(set(chosen)) == 3, "not always the same"


@pytest.mark.parametrize("kind", ["tensor", "double", "array", "list", "Data", "missing"])
def test_pseudo_inputs_start_from_data_of_any_kind(kind):
    x = torch.randn(20, 6)
    missing = x.masked_fill(torch.eye(20, 6) > 0, torch.nan)
    data = {
        "tensor": x,
        "double": x.double(),
        "array": x.numpy(),
        "list": x.tolist(),
        "Data": Data(x),
        "missing": mask_nan(missing),
    }
    vae = vamp_vae(data[kind], components=20)
    expected = missing.nan_to_num(0.0) if kind == "missing" else x
    found = vae.prior.pseudo_inputs
    assert found.dtype == torch.float32
    assert torch.equal(found[found[:, 5].argsort()], expected[expected[:, 5].argsort()])
    vae.check(x)


def test_pseudo_inputs_that_are_images():
    x = torch.rand(20, 3, 4)
    encoder = pv.posteriors.DiagNormal(nn.Sequential(nn.Flatten(-2), nn.Linear(12, 6)))
    vae = vamp_vae(x, components=5, encoder=encoder)
    assert vae.prior.pseudo_inputs.shape == (5, 3, 4)
    z = torch.randn(7, 3)
    q = encoder(vae.prior.pseudo_inputs)
    assert torch.allclose(vae.prior().log_prob(z), q.log_prob(z[:, None]).logsumexp(1) - math.log(5), atol=1e-5)


def test_a_context_is_encoded_with_every_pseudo_input():
    """p(z | c) = Σ_k q(z | u_k, c) / K, by a loop; and such a VAE trains."""
    x, context = torch.randn(40, 6), torch.randn(40, 2)
    vae = vamp_vae(x, contexts=2)
    z = torch.randn(40, 3)
    found = vae.prior(context).log_prob(z)
    for i in range(3):
        q = [vae.encoder(u, context[i]) for u in vae.prior.pseudo_inputs]
        truth = torch.stack([component.log_prob(z[i]) for component in q]).logsumexp(0) - math.log(3)
        assert abs(found[i] - truth) < 1e-5
    assert (found - vae.prior(context.roll(1, 0)).log_prob(z)).abs().max() > 1e-3, "power: the context matters"
    data = Data(x, context=context)
    before = per_datum_elbo(vae, data, num_particles=50).mean()
    pv.fit(vae, data, epochs=20, progress=False, device="cpu")
    assert per_datum_elbo(vae, data, num_particles=50).mean() > before


WRONG_DATA = {
    "a word": ("a", DataError, "data of the VampPrior"),
    "a number": (3, DataError, "one row per datum"),
    "NaN": (torch.full((4, 6), math.nan), DataError, "data of the VampPrior: 24 of 24 values are not finite"),
    "ragged rows": ([[1, 2], [3]], DataError, "differ in length"),
    "too few": (torch.zeros(2, 6), SettingsError, "components is 3; it must be from 1 to the number of data, 2"),
}


@pytest.mark.parametrize("wrong", WRONG_DATA)
def test_data_that_are_none_are_refused_in_one_sentence(wrong):
    data, error, message = WRONG_DATA[wrong]
    with pytest.raises(error, match=message) as caught:
        pv.priors.VampPrior(data, components=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("context", [None, torch.zeros(20, 2)], ids=["without", "with a context"])
def test_pseudo_inputs_of_another_width_than_the_encoders_are_refused(context):
    vae = vamp_vae(torch.randn(20, 5), contexts=0 if context is None else 2)
    with pytest.raises(ModelError, match="cannot take the VampPrior's pseudo-inputs, rows of 5 numbers") as caught:
        vae.check(torch.zeros(20, 6), context)
    assert "\n" not in str(caught.value)


# --- Flows ---


def test_a_flow_that_does_not_live_on_all_real_numbers_is_refused():
    """Outside its circle it repeats itself: no density of latents."""
    flow = zuko.flows.NCSF(2, hidden_features=[8])
    with pytest.raises(ModelError, match=r"the base of NCSF has the support .*the latents is all real numbers"):
        pv.priors.Flow(flow)
    posterior = pv.posteriors.Flow(zuko.flows.NCSF(3, context=4, hidden_features=[8]), net=nn.Linear(6, 4))
    with pytest.raises(ModelError, match="the base of NCSF has the support"):
        posterior(torch.zeros(2, 6))


def test_a_mixture_of_zukos_is_a_prior():
    """It has no reparameterized samples, and says so."""
    prior = pv.priors.Flow(zuko.flows.GMM(2, components=3)).double()
    d = prior()
    assert not d.has_rsample
    with torch.no_grad():
        mixed = prior.flow()
        weight = mixed.logits.softmax(-1)
        mean = (weight[:, None] * mixed.base.mean).sum(0)
    x = d.sample((50_000,))
    assert x.shape == (50_000, 2)
    assert abs(z_score(x[:, 0], mean[0])) < 5
    assert abs(z_score(x[:, 0], mean[0] + 0.05 * x[:, 0].std())) > 5, "power"
    vae = small_vae(latents=2)
    vae.prior = prior
    elbo = per_datum_elbo(vae, torch.zeros(4, 6))
    assert elbo.isfinite().all()
    assert pv.to_datatree(vae, torch.zeros(4, 6), draws=2)["prior"].z.shape == (1, 100, 2)


def test_a_flow_over_a_base_without_gradients_says_so():
    flow = zuko.lazy.Flow(zuko.flows.NICE(2, transforms=1).transform, zuko.flows.GMM(2, components=3))
    assert not pv.priors.Flow(flow)().has_rsample
    assert pv.priors.Flow(zuko.flows.NICE(2, transforms=1))().has_rsample


@pytest.mark.parametrize(
    "flow", ["a", 3, nn.ReLU(), zuko.flows.MAF(2, context=3, hidden_features=[4]), nn.Identity], ids=type
)
def test_what_is_no_flow_is_refused_in_one_sentence(flow):
    with pytest.raises(ModelError) as caught:
        pv.priors.Flow(flow)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "the advice"


def test_the_standard_normal_is_written_out():
    z = torch.randn(5, 3)
    assert torch.allclose(pv.priors.StandardNormal(3)().log_prob(z), normal_log_density(z, torch.zeros(3), 1.0))
