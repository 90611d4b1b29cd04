"""The closed forms that Pyro lacks: against dense normals to rounding, and against Monte Carlo."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import small_vae, z_score
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.elbo import AnalyticKL, HandDerivedELBO, Trace_ELBO, kl_provenance
from pyro_vae.errors import ModelError

D = 4


def normal64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def full(*batch):
    factor = normal64(*batch, D, D).tril(-1) + torch.diag_embed(normal64(*batch, D).exp())
    return dist.MultivariateNormal(normal64(*batch, D), scale_tril=factor)


def low_rank(*batch):
    return dist.LowRankMultivariateNormal(normal64(*batch, D), normal64(*batch, D, 2), normal64(*batch, D).exp())


def diagonal(*batch):
    return dist.Normal(normal64(*batch, D), normal64(*batch, D).exp()).to_event(1)


def laplace(*batch):
    return dist.Laplace(normal64(*batch, D), normal64(*batch, D).exp()).to_event(1)


def dense(q):
    """The same normal as a MultivariateNormal, whose KL torch has."""
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
    return dist.MultivariateNormal(q.mean, covariance)


PAIRS = {
    "full from diagonal": (full, diagonal),
    "low rank from diagonal": (low_rank, diagonal),
    "low rank from full (torch's own)": (low_rank, full),
    "diagonal from low rank": (diagonal, low_rank),
}
FROM_LAPLACE = {"full from Laplace": (full, laplace), "low rank from Laplace": (low_rank, laplace)}


@pytest.mark.parametrize(("left", "right"), [((), ()), ((3,), ()), ((), (3,)), ((2, 3), (3,)), ((2, 1), (3,))], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_the_kl_of_dense_normals(pair, left, right):
    q, p = PAIRS[pair][0](*left), PAIRS[pair][1](*right)
    kl = kl_divergence(q, p)
    assert kl.shape == torch.broadcast_shapes(left, right)
    truth = kl_divergence(dense(q), dense(p))
    assert ((kl - truth).abs() <= 1e-12 * truth.abs().clamp(min=1)).all()


@pytest.mark.parametrize("family", [full, low_rank])
def test_its_gradient_is_that_of_dense_normals(family):
    q, p = family(3), diagonal()
    names = ["loc", "scale_tril"] if family is full else ["loc", "cov_factor", "cov_diag"]
    leaves = [getattr(q, name).clone().requires_grad_() for name in names]
    loc, log_scale = p.base_dist.loc.requires_grad_(), p.base_dist.scale.log().requires_grad_()

    def gradients(as_dense):
        given = [leaves[0], leaves[1].tril()] if family is full else leaves
        kind = dist.MultivariateNormal if family is full else dist.LowRankMultivariateNormal
        q = kind(given[0], scale_tril=given[1]) if family is full else kind(*given)
        p = dist.Normal(loc, log_scale.exp()).to_event(1)
        kl = kl_divergence(dense(q), dense(p)) if as_dense else kl_divergence(q, p)
        return torch.autograd.grad(kl.sum(), [*leaves, loc, log_scale])

    for ours, theirs in zip(gradients(False), gradients(True), strict=True):
        assert ours.abs().max() > 0
        assert ((ours - theirs).abs() <= 1e-12 * theirs.abs().max().clamp(min=1)).all()


def integral(q, p, low, high):
    """∫ q log p by Gauss and Legendre, of each feature."""
    nodes, weights = (torch.tensor(a).view(-1, 1, 1, 1) for a in np.polynomial.legendre.leggauss(200))
    half = (high - low) / 2
    z = low + half + half * nodes
    return (half * weights * q.log_prob(z).exp() * p.log_prob(z)).sum(0)


@pytest.mark.parametrize(("left", "right"), [((), ()), ((3,), ()), ((), (3,)), ((2, 1), (3,))], ids=str)
@pytest.mark.parametrize("pair", FROM_LAPLACE)
def test_from_laplaces_it_is_the_quadratures(pair, left, right):
    """Each feature's E log p is an integral over one normal, in two parts: log p has a kink."""
    q, p = FROM_LAPLACE[pair][0](*left), FROM_LAPLACE[pair][1](*right)
    own, base = dist.Normal(q.mean, q.variance.sqrt()), p.base_dist
    low, high = own.mean - 12 * own.stddev, own.mean + 12 * own.stddev
    kink = base.loc.clamp(low, high)
    expected = integral(own, base, low, kink) + integral(own, base, kink, high)
    kl = kl_divergence(q, p)
    assert kl.shape == torch.broadcast_shapes(left, right)
    assert torch.allclose(kl, -q.entropy() - expected.sum(-1), rtol=1e-9)


@pytest.mark.parametrize("pair", {**PAIRS, **FROM_LAPLACE})
def test_it_is_what_sampling_finds(pair):
    """KL = E_q [log q - log p]; a KL 2 % off is seen (power)."""
    q, p = (make() for make in {**PAIRS, **FROM_LAPLACE}[pair])
    z = q.sample((200_000,))
    ratio, kl = q.log_prob(z) - p.log_prob(z), kl_divergence(q, p)
    assert abs(z_score(ratio, kl)) < 5
    assert abs(z_score(ratio, 1.02 * kl)) > 5


def test_what_has_no_formula_is_still_refused():
    q = full()
    shape_wrong = dist.Normal(normal64(3), 1.0).to_event(1)
    two_dims = dist.Normal(normal64(3, D), 1.0).to_event(2)
    heavy = dist.StudentT(5.0, normal64(D), 1.0).to_event(1)
    wide_laplace = dist.Laplace(normal64(3, D), 1.0).to_event(2)
    for p in (shape_wrong, two_dims, heavy, wide_laplace):
        for correlated in (q, low_rank()):
            with pytest.raises(NotImplementedError):
                kl_divergence(correlated, p)
    for independent in (shape_wrong, two_dims, heavy, laplace()):
        with pytest.raises(NotImplementedError):
            kl_divergence(independent, low_rank())


def test_pyros_own_pairs_are_as_they_were():
    a, b, mvn = diagonal(3), diagonal(3), full()
    by_hand = kl_divergence(a.base_dist, b.base_dist).sum(-1)
    assert torch.equal(kl_divergence(a, b), by_hand)
    assert torch.allclose(kl_divergence(a, mvn), kl_divergence(dense(a), mvn), rtol=1e-12)
    delta = dist.Delta(normal64(D)).to_event(1)
    assert torch.allclose(kl_divergence(delta, mvn), -mvn.log_prob(delta.base_dist.v))
    law = laplace()
    assert torch.equal(kl_divergence(law, law), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("family", ["FullNormal", "LowRankNormal"])
def test_the_estimators_use_it(family):
    """The analytic ELBO has the mean of the sampled one and less noise; by hand it is refused."""
    vae, x = small_vae(), normal64(5, 6)
    kind = getattr(pv.posteriors, family)
    vae.encoder = kind(pv.nn.mlp(6, [8], kind.outputs(3))).double()
    assert kl_provenance(vae.model, vae.guide, x) == {"z": "analytic"}

    def values(loss):
        return torch.tensor([loss.loss(vae.model, vae.guide, x) for _ in range(400)], dtype=torch.float64)

    analytic, sampled = values(AnalyticKL()), values(Trace_ELBO())
    z = (analytic.mean() - sampled.mean()) / math.sqrt((analytic.var() + sampled.var()) / 400)
    assert abs(z) < 5
    kl = kl_divergence(vae.encoder(x), vae.prior()).sum()
    off = (analytic.mean() + kl - sampled.mean()) / math.sqrt((analytic.var() + sampled.var()) / 400)
    assert abs(off) > 5, "power: with the KL counted twice"
    with pytest.raises(ModelError, match="MultivariateNormal"):
        HandDerivedELBO().loss(vae.model, vae.guide, x)
    vae.prior = pv.priors.StudentT(3).double()
    assert kl_provenance(vae.model, vae.guide, x) == {"z": "Monte Carlo"}
