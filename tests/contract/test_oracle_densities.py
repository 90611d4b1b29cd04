"""Each prior, posterior and closed-form KL against a second implementation, in value and gradient."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
import zuko
from helpers import members, reference_kls
from helpers import reference_densities as reference
from helpers.reference_models import perceptron
from torch import nn
from torch.distributions import kl_divergence
from torch.distributions.kl import _KL_REGISTRY

import pyro_vae as pv
from pyro_vae import elbo, posteriors, priors

LATENTS, FEATURES, CONTEXT, N = 4, 4, 2, 5


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def net(given, outputs):
    return nn.Sequential(nn.Linear(given, 7), nn.Tanh(), nn.Linear(7, outputs))


def moved(module):
    """In double precision, its parameters away from where they start."""
    module = module.double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def assert_same(found, expected, by, *, tolerance=1e-10):
    """Values, and gradients of a sum in which each value has a weight of its own, of which no group is zero."""
    assert ((found - expected).abs() < tolerance * expected.abs().clamp(min=1)).all()
    weights = torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype).reshape(found.shape)
    theirs = torch.autograd.grad((weights * expected).sum(), by, retain_graph=True)
    for one, other in zip(torch.autograd.grad((weights * found).sum(), by), theirs, strict=True):
        assert other.abs().max() > 1e-3, "power"
        assert (one - other).abs().max() < tolerance * other.abs().max().clamp(min=1)


# --- Priors ---


def named(prior, names):
    return [dict(prior.named_parameters())[name] for name in names]


def vamp(*, context):
    """A VampPrior of a VAE, and q at its pseudo-inputs written out, at each datum's context if any."""
    behind = CONTEXT if context else 0
    prior = priors.VampPrior(double(20, FEATURES), components=4)
    vae = pv.VAE(
        prior=prior,
        decoder=pv.likelihoods.Normal(net(LATENTS + behind, FEATURES)),
        encoder=posteriors.DiagNormal(net(FEATURES + behind, 2 * LATENTS)),
    ).double()
    p = {**dict(prior.named_parameters()), **dict(vae.encoder.named_parameters())}

    def log_density(z, c=None):
        u = p["pseudo_inputs"]
        if c is not None:
            u = torch.cat([u.expand(len(c), 4, FEATURES), c[:, None].expand(len(c), 4, CONTEXT)], -1)
        loc, log_scale = perceptron(p, "net", u).chunk(2, -1)
        return reference.mixture(z, torch.zeros(4).double(), loc, log_scale)

    return prior, log_density, list(p.values())


def flow_prior():
    prior = moved(priors.Flow(zuko.flows.MAF(LATENTS, transforms=2, hidden_features=[8])))

    def log_density(z):
        return torch.stack([reference.change_of_variables(row, prior.flow().transform) for row in z])

    return prior, log_density, list(prior.parameters())


def context_normal():
    prior = moved(priors.ContextNormal(net(CONTEXT, 2 * LATENTS)))
    p = dict(prior.named_parameters())
    return prior, lambda z, c: reference.normal(z, *perceptron(p, "net", c).chunk(2, -1)), list(p.values())


def gumbel_softmax_prior():
    prior = moved(priors.GumbelSoftmax(LATENTS, categories=3, temperature=0.7))
    (logits,) = prior.parameters()
    return prior, lambda z: reference.gumbel_softmax(z, logits, 3, 0.7), [logits]


def plain(name):
    row = reference.PRIORS[name]
    prior = moved(members.prior(name, row, LATENTS))
    parameters = named(prior, row.parameters)
    return prior, lambda z: row.log_density(z, *parameters), parameters


PRIORS = {
    **{name: partial(plain, name) for name in reference.PRIORS},
    "VampPrior": lambda: vamp(context=False),
    "VampPrior, context": lambda: vamp(context=True),
    "ContextNormal": context_normal,
    "GumbelSoftmax": gumbel_softmax_prior,
    "Flow": flow_prior,
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_priors_log_density(name):
    prior, log_density, parameters = PRIORS[name]()
    given = (double(N, CONTEXT),) if "ontext" in name else ()
    z = (2 * double(N, LATENTS)).requires_grad_()
    assert_same(prior(*given).log_prob(z), log_density(z, *given), [z, *parameters])


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "Flow"])
def test_a_priors_samples_have_its_density(name):
    """Stein's identity E[∂ log p(z) / ∂z] = 0, E[z ∂ log p(z) / ∂z] = -1, by the reference's density."""
    prior, log_density, _ = PRIORS[name]()
    given = (double(1, CONTEXT).expand(20_000, CONTEXT),) if "ontext" in name else ()
    d = prior(*given)
    z = (d.sample() if given else d.sample((20_000,))).requires_grad_()
    (slope,) = torch.autograd.grad(log_density(z, *given).sum(), z)
    for values in (*slope.T, *(z.detach() * slope + 1).T):
        assert abs(values.mean() / (values.std() / len(values) ** 0.5)) < 5
    values = (1.1 * z.detach() * slope + 1)[:, 0]
    assert abs(values.mean() / (values.std() / len(values) ** 0.5)) > 5, "power"


# --- Posteriors ---


def flow_posterior():
    posterior = posteriors.Flow(
        zuko.flows.MAF(LATENTS, context=2, transforms=2, hidden_features=[8]), net=net(FEATURES, 2)
    )
    posterior = moved(posterior)

    def log_density(z, numbers):
        pairs = zip(z, numbers, strict=True)
        return torch.stack([reference.change_of_variables(row, posterior.flow(c).transform) for row, c in pairs])

    return posterior, log_density


POSTERIORS = {
    "DiagNormal": lambda: (
        moved(posteriors.DiagNormal(net(FEATURES, 2 * LATENTS))),
        lambda z, out: reference.normal(z, out[:, :LATENTS], out[:, LATENTS:]),
    ),
    "FullNormal": lambda: (
        moved(posteriors.FullNormal(net(FEATURES, posteriors.FullNormal.outputs(LATENTS)))),
        partial(reference.full_normal, size=LATENTS),
    ),
    "LowRankNormal": lambda: (
        moved(posteriors.LowRankNormal(net(FEATURES, posteriors.LowRankNormal.outputs(LATENTS, rank=2)), 2)),
        partial(reference.low_rank_normal, size=LATENTS, rank=2),
    ),
    "GumbelSoftmax": lambda: (
        moved(posteriors.GumbelSoftmax(net(FEATURES, 6), 3, temperature=0.7)),
        lambda z, out: reference.gumbel_softmax(z, out.unflatten(-1, (2, 3)), 3, 0.7),
    ),
    "Flow": flow_posterior,
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_posteriors_log_density(name):
    posterior, log_density = POSTERIORS[name]()
    x, z = double(N, FEATURES), double(N, LATENTS).requires_grad_()
    numbers = perceptron(dict(posterior.named_parameters()), "net", x)
    parameters = list(posterior.parameters())
    assert_same(posterior(x).log_prob(z), log_density(z, numbers), [z, *parameters])


def test_a_flows_draw_is_differentiated_at_fixed_noise():
    """f(z; φ) = ε is constant, so dz/dφ = -(∂f/∂z)⁻¹ ∂f/∂φ."""
    posterior, _ = flow_posterior()
    x, weights, parameters = double(1, FEATURES), double(LATENTS), list(posterior.parameters())
    z = posterior(x)()[0]
    to_base = posterior.flow(posterior.net(x)[0]).transform
    jacobian = torch.autograd.functional.jacobian(to_base, z.detach())
    expected = torch.autograd.grad(-torch.linalg.solve(jacobian.T, weights) @ to_base(z.detach()), parameters)
    for one, other in zip(torch.autograd.grad(weights @ z, parameters), expected, strict=True):
        assert other.abs().max() > 1e-3, "power"
        assert (one - other).abs().max() < 1e-10 * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_posterior_with_a_context_sees_it_behind_the_data(name):
    posterior, _ = POSTERIORS[name]()
    whole, z = double(N, FEATURES), double(N, LATENTS)
    expected = posterior(whole).log_prob(z)
    assert (posterior(whole[:, :3], whole[:, 3:]).log_prob(z) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["DiagNormal", "FullNormal", "LowRankNormal"])
def test_a_posteriors_samples_have_its_moments(name):
    """Mean and covariance, by the scores of the reference: E[s] = 0, E[z sᵀ] = -I."""
    posterior, log_density = POSTERIORS[name]()
    with torch.no_grad():
        numbers = posterior.net(double(1, FEATURES)).expand(20_000, -1)
        z = posterior.distribution(numbers).sample()
    z = z.requires_grad_()
    (slope,) = torch.autograd.grad(log_density(z, numbers).sum(), z)
    products = (z.detach().unsqueeze(-1) * slope.unsqueeze(-2)).flatten(1) + torch.eye(LATENTS).double().flatten()
    for values in (*slope.T, *products.T):
        assert abs(values.mean() / (values.std() / len(values) ** 0.5)) < 5


@pytest.mark.parametrize(("steps", "rate"), [(1, 1.0), (4, 0.5), (6, 1.9), (5, 8.0)])
def test_a_refined_posterior_takes_newtons_steps_of_the_exact_elbo(steps, rate):
    """Of a linear-Gaussian model, whose ELBO the noise, of covariance I, integrates exactly.

    At rates of 1.9 and 8 some steps are refused. The gradient by φ is that of the place at which the steps end.
    """
    weight, bias, noise = double(FEATURES, LATENTS), double(FEATURES), 0.75
    decoder = pv.likelihoods.Normal(nn.Linear(LATENTS, FEATURES), scale=noise).double()
    decoder.net.weight.data, decoder.net.bias.data = weight, bias
    refined = posteriors.Refined(net(FEATURES, 2 * LATENTS), steps=steps, rate=rate, particles=4 * LATENTS).double()
    pv.VAE(prior=priors.StandardNormal(LATENTS).double(), decoder=decoder, encoder=refined)
    x, z = double(N, FEATURES), double(N, LATENTS).requires_grad_()
    start = perceptron(dict(refined.net.named_parameters()), "net", x).chunk(2, -1)
    place = [part.detach() for part in start]
    end = reference.refined(x, weight, bias, noise, *place, steps=steps, rate=rate)
    loc, log_scale = (s + (e - p) for s, e, p in zip(start, end, place, strict=True))
    assert_same(refined(x).log_prob(z), reference.normal(z, loc, log_scale), [z, *refined.parameters()])


# --- Kullback-Leibler divergences ---


def full(d, *batch):
    factor = double(*batch, d, d).tril(-1) + torch.diag_embed((0.5 * double(*batch, d)).exp())
    loc, factor = double(*batch, d).requires_grad_(), factor.requires_grad_()
    return dist.MultivariateNormal(loc, scale_tril=factor.tril()), [loc, factor]


def low_rank(d, *batch):
    leaves = [double(*batch, d), double(*batch, d, 2), (0.5 * double(*batch, d)).exp()]
    return dist.LowRankMultivariateNormal(*(leaf.requires_grad_() for leaf in leaves)), leaves


def independent(family):
    def make(d, *batch):
        leaves = [double(*batch, d).requires_grad_(), (0.5 * double(*batch, d)).exp().requires_grad_()]
        return family(*leaves).to_event(1), leaves

    return make


def covariance(q, leaves):
    """Of the leaves that a normal was made of."""
    if isinstance(q, dist.MultivariateNormal):
        return leaves[1].tril() @ leaves[1].tril().transpose(-1, -2)
    if isinstance(q, dist.LowRankMultivariateNormal):
        return leaves[1] @ leaves[1].transpose(-1, -2) + torch.diag_embed(leaves[2])
    return torch.diag_embed(leaves[1] ** 2)


diagonal, laplaces = independent(dist.Normal), independent(dist.Laplace)
KLS = {
    "full normal from normals": (full, diagonal),
    "low-rank normal from normals": (low_rank, diagonal),
    "normals from low-rank normal": (diagonal, low_rank),
    "normals from normals": (diagonal, diagonal),
    "full normal from Laplaces": (full, laplaces),
    "low-rank normal from Laplaces": (low_rank, laplaces),
}
BATCHES = [((), ()), ((3,), ()), ((3,), (3,)), ((), (3,)), ((2, 1), (3,))]


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("name", KLS)
def test_a_kl_is_its_formula(name, d, batches):
    (q, of_q), (p, of_p) = (make(d, *batch) for make, batch in zip(KLS[name], batches, strict=True))
    if "Laplace" in name:
        expected = reference_kls.normal_from_laplaces(of_q[0], covariance(q, of_q), *of_p)
    else:
        expected = reference_kls.of_normals(of_q[0], covariance(q, of_q), of_p[0], covariance(p, of_p))
    assert kl_divergence(q, p).shape == torch.broadcast_shapes(*batches)
    assert_same(kl_divergence(q, p), expected, [*of_q, *of_p])


@pytest.mark.parametrize("name", KLS)
def test_a_kl_is_its_integral(name):
    """Over two dimensions; with Laplaces, whose density has a kink, to 1 in 300."""
    (q, of_q), (p, _) = (make(2) for make in KLS[name])
    with torch.no_grad():
        expected = reference_kls.by_quadrature(q.log_prob, p.log_prob, of_q[0], covariance(q, of_q))
        tolerance = 3e-3 if "Laplace" in name else 1e-10
        assert abs(kl_divergence(q, p) - expected) < tolerance * expected.clamp(min=1)


def test_every_kl_that_this_library_registers_is_among_them():
    ours = {pair for pair, formula in _KL_REGISTRY.items() if formula.__module__.startswith("pyro_vae")}
    kinds = {full: torch.distributions.MultivariateNormal, low_rank: torch.distributions.LowRankMultivariateNormal}
    here = {tuple(kinds.get(make, torch.distributions.Independent) for make in pair) for pair in KLS.values()}
    assert ours <= here
    assert len(ours) == 3


@pytest.mark.parametrize("name", ["FullNormal", "LowRankNormal"])
@pytest.mark.parametrize("prior", [priors.Normal, priors.Laplace])
def test_the_elbo_of_a_correlated_posterior_has_that_kl(name, prior):
    """Of one particle, n/m = 3; with the decoder ignoring z the likelihood is known without its noise."""
    posterior, _ = POSTERIORS[name]()
    decoder = pv.likelihoods.Normal(nn.Linear(LATENTS, FEATURES), scale=1.0).double()
    nn.init.zeros_(decoder.net.weight)
    vae = pv.VAE(prior=moved(prior(LATENTS)), decoder=decoder, encoder=posterior)
    x = double(N, FEATURES)
    numbers = perceptron(dict(posterior.named_parameters()), "net", x)
    q = posterior(x)
    own = (vae.prior.loc, vae.prior.log_scale.exp())
    if prior is priors.Normal:
        kl = reference_kls.of_normals(numbers[:, :LATENTS], q.covariance_matrix, own[0], torch.diag_embed(own[1] ** 2))
    else:
        kl = reference_kls.normal_from_laplaces(numbers[:, :LATENTS], q.covariance_matrix, *own)
    likelihood = reference.normal(x, decoder.net.bias, torch.zeros(FEATURES).double())
    found = elbo.AnalyticKL().differentiable_loss(vae.model, vae.guide, x, 3 * N)
    assert_same(found, -3 * (likelihood - kl).sum(), [*posterior.parameters(), *vae.prior.parameters()])


COVERED_PRIORS = {name.split(",")[0] for name in PRIORS}
COVERED_POSTERIORS = {*POSTERIORS, "Refined"}
