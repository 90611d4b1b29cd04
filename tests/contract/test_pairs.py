"""Every prior with every likelihood and every posterior: it trains, and Pyro's two ELBOs agree in expectation.

Each two of them meet in the ordinary run; the other ways for three to meet are slow.
"""

import itertools

import pyro
import pytest
import torch
from helpers.checks import z_score
from helpers.members import FEATURES, LATENTS, LIKELIHOODS, POSTERIORS, PRIORS, make
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.elbo import kl_provenance
from pyro_vae.train import per_datum_elbo
from pyro_vae.train.compiled.optimizers import WholeOptimizer

NUMBERED = itertools.product(*(enumerate(part) for part in (PRIORS, LIKELIHOODS, POSTERIORS)))
"""Each with its place in its table."""

TRIPLES = {
    (prior, likelihood, posterior): (i + j) % len(POSTERIORS) == k
    for (i, prior), (j, likelihood), (k, posterior) in NUMBERED
}
"""Whether it is one of the few by which each two meet."""


def assembled(prior, likelihood, posterior):
    """A tiny VAE, and data drawn from another of the same likelihood, so that they lie in its support."""
    vae = pv.VAE(prior=make(PRIORS[prior]), decoder=make(LIKELIHOODS[likelihood]), encoder=make(POSTERIORS[posterior]))
    torch.manual_seed(3)
    teacher = LIKELIHOODS[likelihood]().double()
    with torch.no_grad():
        x = teacher(2 * torch.randn(40, LATENTS, dtype=torch.float64)).sample()
    assert x.shape == (40, FEATURES)
    return vae, x


def mean_elbo(vae, x):
    torch.manual_seed(5)
    return per_datum_elbo(vae, x, num_particles=20).mean().item()


def test_each_two_meet_in_the_ordinary_run():
    few = [names for names, ordinary in TRIPLES.items() if ordinary]
    for some in itertools.combinations(range(3), 2):
        assert {tuple(names[i] for i in some) for names in few} == {tuple(names[i] for i in some) for names in TRIPLES}
    assert len(few) == len(TRIPLES) / len(POSTERIORS)


@pytest.mark.parametrize(
    ("prior", "likelihood", "posterior"),
    [
        pytest.param(*names, id=" · ".join(names), marks=() if ordinary else pytest.mark.slow)
        for names, ordinary in TRIPLES.items()
    ],
)
def test_every_combination_trains_and_its_elbos_agree(prior, likelihood, posterior):
    vae, x = assembled(prior, likelihood, posterior)
    before = mean_elbo(vae, x)
    adam = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr=1e-2)
    svi = SVI(vae.model, vae.guide, WholeOptimizer(adam), Trace_ELBO())
    torch.manual_seed(6)
    with pyro.validation_enabled(False):
        for _ in range(8):
            svi.step(x)
        assert mean_elbo(vae, x) > before
        agree_in_expectation(vae, x)


def agree_in_expectation(vae, x):
    def values(loss, draws):
        torch.manual_seed(7)
        with torch.no_grad():
            return torch.tensor([float(loss.loss(vae.model, vae.guide, x)) for _ in range(draws)]) / len(x)

    if kl_provenance(vae.model, vae.guide, x)["z"] == "Monte Carlo":  # then they are one computation
        sampled, other = values(Trace_ELBO(), 2), values(TraceMeanField_ELBO(), 2)
        assert (sampled - other).abs().max() < 1e-6 * sampled.abs().max()
        return
    apart = values(Trace_ELBO(), 25) - values(TraceMeanField_ELBO(), 25)  # the same noise: the likelihood cancels
    assert apart.abs().max() > 0, "they are different computations"
    assert abs(z_score(apart, 0.0)) < 5
