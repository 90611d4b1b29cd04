"""The latents of several sites as one vector: annealing, NUTS and codes of a Pair, against the exact posterior."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_pair import A, exact_moments, oracle, pair

import pyro_vae as pv
from pyro_vae.core.rows import Rows
from pyro_vae.errors import ModelError


@pytest.fixture
def x():
    return oracle().sample(5)


def test_densities_at_joined_latents_are_those_of_the_sites(x):
    two = pair(1.4)
    q = two.posterior(Rows(x))
    assert q.names == ["z1[0]", "z1[1]", "z2[0]", "z2[1]", "z2[2]"]
    z = q.sample((7, 3))
    assert z.shape == (7, 3, 5, 5)
    w = z[..., 2:], z[..., :2]
    both = two.guide.owner
    log_q = dist.MultivariateNormal(both.encoder(x), 1.4 * both.covariance).log_prob(w[0])
    log_q = log_q + dist.MultivariateNormal(w[0] @ A @ both.top / 0.6**2, 1.4 * both.top).log_prob(w[1])
    log_p = dist.Normal(0.0, 1.0).log_prob(w[1]).sum(-1) + dist.Normal(w[1] @ A.T, 0.6).log_prob(w[0]).sum(-1)
    log_p = log_p + dist.Normal(both.decoder(w[0]), 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(q.log_prob(z), log_q)
    torch.testing.assert_close(q.log_joint(z), log_p)
    torch.testing.assert_close(two.log_joint(z[0, 0], Rows(x)), log_p[0, 0])


@pytest.mark.parametrize("method", ["ais", "ais_prior"])
def test_annealing_moves_all_sites(method, x):
    truth = oracle().log_marginal(x).numpy()
    temperatures = 12 if method == "ais" else 40
    found = pv.log_evidence(pair(1.7), x, method=method, num_particles=60, temperatures=temperatures)
    assert (abs(found.log_evidence - truth) < 5 * found.mcse).all()
    assert (found.acceptance > 0.4).all()
    plain = pv.log_evidence(pair(1.7), x, num_particles=60)
    if method == "ais":
        assert float(found.mcse.mean()) < 0.7 * float(plain.mcse.mean()), "power"
        exact = pv.log_evidence(pair(), x, method="ais", num_particles=4, temperatures=3)
        np.testing.assert_allclose(exact.log_evidence, truth, atol=1e-9)


def test_nuts_finds_the_posterior_of_all_sites(x):
    found = pv.diagnose.nuts(pair(), x, data=1, chains=2, warmup=30, draws=40)
    assert found.latent.values.tolist() == ["z1[0]", "z1[1]", "z2[0]", "z2[1]", "z2[2]"]
    for site, (mean, covariance) in exact_moments(x).items():
        of = found.isel(datum=0, latent=[str(name).startswith(site) for name in found.latent.values])
        assert (abs(of["mean"] - mean[0].numpy()) < 5 * of.mean_se).all()
        assert (abs(of.sd / covariance.diagonal().sqrt().numpy() - 1) < 0.5).all()
    assert "in latent z" in pv.diagnose.judge_nuts(found).why


def test_codes_are_the_means_of_the_guide(x):
    found = pv.encode(pair(), x, draws=4000)
    for site, (mean, covariance) in exact_moments(x).items():
        of = found.isel(latent=[str(name).startswith(site) for name in found.latent.values])
        assert (abs(of.z - mean.numpy()) < 5 * of.z_mcse).all()
        assert (abs(of.z_sd / covariance.diagonal().sqrt().numpy() - 1) < 0.1).all()


def positive(x, size=None):
    with pyro.plate("data", len(x) if size is None else size, subsample=x):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def classes(x, size=None):
    with pyro.plate("data", len(x) if size is None else size, subsample=x):
        y = pyro.sample("y", dist.Categorical(torch.ones(2).double()))
        pyro.sample("x", dist.Normal(y.double().unsqueeze(-1).expand(*y.shape, 2), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(("program", "kind"), [(positive, "z has bounded"), (classes, "y has discrete")])
def test_latents_that_no_gradient_moves_are_refused(program, kind):
    alone = pv.Pair(program, pyro.poutine.block(program, hide=["x"]))
    for ask in (pv.encode, pv.diagnose.nuts, lambda p, x: pv.log_evidence(p, x, method="ais")):
        with pytest.raises(ModelError, match=f"site {kind} latents"):
            ask(alone, torch.ones(3, 2).double())
