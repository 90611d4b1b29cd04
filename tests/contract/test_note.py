"""The note, equation by equation: each test holds the corrected statement of the equation it is named after.

Where a test is statistical, it also shows its power: the same statistic rejects a planted error.
"""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import linear_gaussian, loss_and_gradients, normal_log_density, small_vae, z_score
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

import pyro_vae as pv


def gauss_hermite(points: int = 60):
    """Nodes and weights for the expectation under N(0, 1), exact for polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))


def log_likelihoods(model, x, z):
    """log p(x_j | z_i), shape (i, j)."""
    return normal_log_density(x, (z @ model.weight.T + model.bias).unsqueeze(1), model.scale)


def random_q(seed: int, n: int, latents: int = 2):
    torch.manual_seed(seed)
    return dist.Normal(torch.randn(n, latents).double(), torch.rand(n, latents).double() + 0.2).to_event(1)


def test_equation_01_the_evidence_is_the_prior_mean_of_the_likelihood():
    model = linear_gaussian(scale=1.5)
    x = model.sample(1)
    truth = model.log_marginal(x).exp()

    def estimates(prior_scale):
        z = prior_scale * torch.randn(20_000 * 64, 2).double()
        return log_likelihoods(model, x, z).exp().reshape(20_000, 64).mean(1)

    unbiased = estimates(1.0)
    assert abs(z_score(unbiased, truth)) < 5
    assert z_score(unbiased.log(), truth.log()) < -5, "the log of the estimate is biased low"
    assert abs(z_score(estimates(1.1), truth)) > 5, "power: a prior 10 % too wide is seen"


def test_equation_02_a_product_of_means_is_not_the_mean_of_products():
    model, n = linear_gaussian(features=2, latents=1, scale=2.0), 3
    x = model.sample(n)
    product_of_means = model.log_marginal(x).sum()
    # With one z for all data the observations are jointly normal, correlated through z.
    shared = torch.kron(torch.ones(n, n).double(), model.weight @ model.weight.T)
    covariance = shared + model.scale**2 * torch.eye(2 * n).double()
    one_z = dist.MultivariateNormal(model.bias.repeat(n), covariance).log_prob(x.flatten())
    likelihoods = log_likelihoods(model, x, torch.randn(200_000, 1).double())
    mean_of_products = likelihoods.sum(1).exp()
    assert abs(z_score(mean_of_products, one_z.exp())) < 5
    assert abs(z_score(mean_of_products, product_of_means.exp())) > 5, "power: it is the other quantity"
    separate = log_likelihoods(model, x, torch.randn(200_000, 1).double()).exp()
    for j in range(n):
        assert abs(z_score(separate[:, j], model.log_marginal(x)[j].exp())) < 5


def test_equation_03_least_divergence_is_most_expected_log_likelihood():
    data = dist.Normal(torch.tensor(0.7, dtype=torch.float64), 1.3)
    means = torch.linspace(-2, 2, 401).double()
    divergence = kl_divergence(data, dist.Normal(means, 1.0))
    nodes, weights = gauss_hermite()
    expected = (weights * dist.Normal(means.unsqueeze(1), 1.0).log_prob(0.7 + 1.3 * nodes)).sum(1)
    assert divergence.argmin() == expected.argmax() == (means - 0.7).abs().argmin()
    constant = divergence + expected  # minus the entropy of the data, whatever the model
    assert (constant + data.entropy()).abs().max() < 1e-12


def test_equation_04_the_empirical_distribution_turns_it_into_maximum_likelihood():
    x, means = torch.randn(8).double() + 0.3, torch.linspace(-2, 2, 401).double()
    log_likelihood = dist.Normal(means.unsqueeze(1), 1.0).log_prob(x)
    product, mean_log = log_likelihood.exp().prod(1), log_likelihood.mean(1)
    assert product.argmax() == mean_log.argmax() == (means - x.mean()).abs().argmin()


def test_equation_05_the_log_of_a_product_of_expectations_is_a_sum_of_logs_of_expectations():
    model = linear_gaussian(latents=1)
    x, (nodes, weights) = model.sample(4), gauss_hermite(200)
    expectations = weights @ log_likelihoods(model, x, nodes.unsqueeze(1)).exp()
    assert abs(expectations.prod().log() - expectations.log().sum()) < 1e-12
    assert (expectations.log() - model.log_marginal(x)).abs().max() < 1e-9
    log_inside = (weights @ log_likelihoods(model, x, nodes.unsqueeze(1))).sum()
    assert expectations.log().sum() - log_inside > 1, "what stays hard: log and expectation do not commute"


def test_equation_06_the_logarithm_lies_below_its_tangents():
    x, y = torch.rand(50, 1).double() * 5 + 0.1, torch.rand(1, 50).double() * 5 + 0.1
    assert (y.log() <= x.log() + (y - x) / x + 1e-15).all()
    assert (x.log() + (x - x) / x - x.log()).abs().max() == 0, "and touches them at x"


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.5])
def test_equation_07_jensens_gap_of_a_lognormal_is_half_its_variance(sigma):
    nodes, weights = gauss_hermite(80)
    y = (0.4 + sigma * nodes).exp()
    gap = (weights * y).sum().log() - (weights * y.log()).sum()
    assert abs(gap - sigma**2 / 2) < 1e-10


def test_equation_08_the_expected_log_likelihood_is_a_bound_and_its_maximum_has_no_weights():
    model = linear_gaussian()
    x = model.sample(6)

    def expected_log_likelihood(weight):
        constant = -0.5 * 5 * math.log(2 * math.pi * 0.8**2)
        return constant - (((x - model.bias) ** 2).sum(1) + (weight**2).sum()) / (2 * 0.8**2)

    nodes, weights = gauss_hermite(20)
    z = torch.cartesian_prod(nodes, nodes)
    by_quadrature = torch.outer(weights, weights).flatten() @ log_likelihoods(model, x, z)
    assert (by_quadrature - expected_log_likelihood(model.weight)).abs().max() < 1e-11
    assert (by_quadrature < model.log_marginal(x)).all()
    weight = model.weight.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -expected_log_likelihood(weight).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert weight.detach().norm() < 1e-8, "maximized alone it is degenerate"
    assert model.weight.norm() > 1


def test_equation_09_joint_over_posterior_is_the_evidence_at_every_z():
    model = linear_gaussian()
    x = model.sample(4)
    for z in 2 * torch.randn(20, 4, 2).double():
        joint = normal_log_density(z, torch.zeros(2).double(), 1.0) + log_likelihoods(model, x, z).diagonal()
        assert (joint - model.posterior(x).log_prob(z) - model.log_marginal(x)).abs().max() < 1e-11


def full_q(seed, n):
    torch.manual_seed(seed)
    factor = torch.tril(torch.randn(n, 2, 2).double(), -1) + torch.diag_embed(torch.rand(n, 2).double() + 0.3)
    return dist.MultivariateNormal(torch.randn(n, 2).double(), scale_tril=factor)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_equation_10_evidence_is_elbo_plus_divergence(family, seed):
    model = linear_gaussian()
    x = model.sample(4)
    q = random_q(seed, 4) if family == "diagonal" else full_q(seed, 4)
    as_full = q if family == "full" else dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    divergence = kl_divergence(as_full, model.posterior(x))
    assert (model.elbo(x, q) + divergence - model.log_marginal(x)).abs().max() < 1e-11


def test_equation_11_the_elbo_is_a_bound_tight_only_at_the_posterior():
    model = linear_gaussian()
    x = model.sample(4)
    evidence = model.log_marginal(x)
    assert all((model.elbo(x, full_q(seed, 4)) < evidence).all() for seed in range(50))
    assert (model.elbo(x, model.posterior(x)) - evidence).abs().max() < 1e-12
    best, precision = model.best_diagonal(x), model.precision
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert gap > 0.03
    assert (evidence - model.elbo(x, best) - gap).abs().max() < 1e-12
    for seed in range(50):  # whatever way a diagonal q moves, it loses
        step = 0.05 * random_q(seed, 4).sample()
        moved = dist.Normal(best.mean + step, best.stddev * (step.flip(1)).exp()).to_event(1)
        assert (model.elbo(x, moved) < model.elbo(x, best)).all()


def test_equation_12_the_bound_of_a_data_set_is_the_sum_of_its_bounds():
    model = linear_gaussian()
    x, q = model.sample(4), random_q(0, 4)
    divergence = kl_divergence(q, pv.priors.StandardNormal(2).double()())
    nodes, weights = gauss_hermite(20)
    noise, weight = torch.cartesian_prod(nodes, nodes), torch.outer(weights, weights).flatten()
    parts = []
    for i in range(4):
        z = q.mean[i] + q.stddev[i] * noise
        parts.append(weight @ log_likelihoods(model, x[i : i + 1], z).squeeze(1) - divergence[i])
    assert abs(sum(parts) - model.elbo(x, q).sum()) < 1e-11
    assert sum(parts) < model.log_marginal(x).sum()


def test_equation_13_amortization_can_only_lower_the_bound():
    model = linear_gaussian()
    x = model.sample(20)
    amortized = small_vae(features=5, latents=2).encoder(x)
    loc, log_scale = (t.detach().clone().requires_grad_() for t in (amortized.mean, amortized.stddev.log()))
    optimizer = torch.optim.LBFGS([loc, log_scale], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -model.elbo(x, dist.Normal(loc, log_scale.exp()).to_event(1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    own = model.elbo(x, dist.Normal(loc, log_scale.exp()).to_event(1))
    assert (model.elbo(x, amortized) < own).all(), "datum by datum"
    assert (own - model.elbo(x, model.best_diagonal(x))).abs().max() < 1e-8


def test_equation_14_the_three_parts_have_the_densities_of_the_note():
    vae = small_vae()
    x, z = torch.randn(4, 6).double(), torch.randn(4, 3).double()
    mu, log_sigma = vae.encoder.net(x).chunk(2, 1)
    assert (vae.encoder(x).log_prob(z) - normal_log_density(z, mu, log_sigma.exp())).abs().max() < 1e-13
    assert (vae.prior().log_prob(z) - normal_log_density(z, torch.zeros(3).double(), 1.0)).abs().max() < 1e-13
    f, s = vae.decoder.net(z), vae.decoder.scale
    assert (vae.decoder(z).log_prob(x) - normal_log_density(x, f, s)).abs().max() < 1e-13


MU = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
SIGMA = torch.tensor([0.5, 1.7, 0.9], dtype=torch.float64)


def expectation(function):
    """E of ``function(z)`` under N(MU, diag(SIGMA²)), by quadrature in three dimensions."""
    nodes, weights = gauss_hermite(24)
    noise = torch.cartesian_prod(nodes, nodes, nodes)
    weight = torch.cartesian_prod(weights, weights, weights).prod(1)
    return (weight * function(MU + SIGMA * noise)).sum()


def log_q(z):
    return normal_log_density(z, MU, SIGMA)


def log_p(z):
    return normal_log_density(z, torch.zeros(3).double(), 1.0)


def test_equation_15_the_divergence_splits_into_two_integrals():
    first, second = expectation(log_q), expectation(log_p)
    exact = kl_divergence(dist.Normal(MU, SIGMA).to_event(1), dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
    assert abs(first - second - exact) < 1e-12


def test_equation_16_the_covariance_is_the_square_of_sigma():
    z = torch.randn(10, 3).double()
    written = torch.exp(-0.5 * ((z - MU) ** 2 / SIGMA**2).sum(1)) / ((2 * math.pi) ** 1.5 * SIGMA.prod())
    torch_density = dist.MultivariateNormal(MU, torch.diag(SIGMA**2)).log_prob(z).exp()
    assert ((written - torch_density) / torch_density).abs().max() < 1e-12
    slip = dist.MultivariateNormal(MU, torch.diag(SIGMA)).log_prob(z).exp()
    assert ((written - slip) / slip).abs().max() > 0.1, "the text's cov = diag(σ) is another density"


def test_equation_17_the_second_integral_is_a_constant_and_j():
    normalized = (2 * math.pi) ** 1.5 * SIGMA.prod()
    j = normalized * expectation(lambda z: (z**2).sum(1))
    assert abs(expectation(log_p) - (-1.5 * math.log(2 * math.pi) - j / (2 * normalized))) < 1e-12


def test_equation_18_each_j_is_a_second_moment():
    normalized = (2 * math.pi) ** 1.5 * SIGMA.prod()
    for k in range(3):
        by_quadrature = normalized * expectation(lambda z, k=k: z[:, k] ** 2)
        assert abs(by_quadrature - normalized * (SIGMA[k] ** 2 + MU[k] ** 2)) < 1e-11
        # The printed integrand, (z - μ)² + 2μz - μ, has μ where μ² belongs.
        printed = normalized * expectation(lambda z, k=k: (z[:, k] - MU[k]) ** 2 + 2 * MU[k] * z[:, k] - MU[k])
        assert abs(by_quadrature - printed) > 1


def test_equation_19_j_is_the_sum_of_second_moments():
    normalized = (2 * math.pi) ** 1.5 * SIGMA.prod()
    j = normalized * expectation(lambda z: (z**2).sum(1))
    assert abs(j - normalized * (SIGMA**2 + MU**2).sum()) < 1e-11
    printed = normalized * SIGMA.sum() * (SIGMA**2 + MU**2).sum()
    assert abs(j - printed) > 1, "the printed line has a spurious Σσ"


def test_equation_20_the_second_integral():
    assert abs(expectation(log_p) - (-1.5 * math.log(2 * math.pi) - 0.5 * (SIGMA**2 + MU**2).sum())) < 1e-12


def test_equation_21_the_first_integral_is_minus_the_entropy():
    written = -1.5 * math.log(2 * math.pi) - 0.5 * (1 + (SIGMA**2).log()).sum()
    assert abs(written + dist.Normal(MU, SIGMA).to_event(1).entropy()) < 1e-13
    assert abs(written - expectation(log_q)) < 1e-12


def test_equation_22_the_divergence_in_closed_form():
    written = -0.5 * (1 + (SIGMA**2).log() - SIGMA**2 - MU**2).sum()
    exact = kl_divergence(dist.Normal(MU, SIGMA).to_event(1), dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
    assert abs(written - exact) < 5e-15
    # The library's own lines: the hand-derived ELBO minus its sampled log-likelihood is minus this.
    vae, x = small_vae(), torch.randn(4, 6).double()
    value, _ = loss_and_gradients(pv.elbo.HandDerivedELBO(), vae, x)
    torch.manual_seed(1)
    q = vae.encoder(x)
    log_likelihood = vae.decoder(q.mean + q.stddev * torch.randn(4, 3, dtype=torch.float64)).log_prob(x).sum()
    assert abs(value + log_likelihood - kl_divergence(q, vae.prior()).sum()) < 1e-12


@pytest.mark.parametrize("particles", [1, 7])
def test_equation_23_the_elbo_of_pyro_with_the_same_noise(particles):
    vae, x = small_vae(), torch.randn(5, 6).double()
    by_hand, gradients = loss_and_gradients(pv.elbo.HandDerivedELBO(particles), vae, x, 65)
    pyro_value, pyro_gradients = loss_and_gradients(TraceMeanField_ELBO(num_particles=particles), vae, x, 65)
    assert abs(by_hand - pyro_value) / 65 < 1e-12
    assert max((gradients[k] - pyro_gradients[k]).abs().max() for k in gradients) / 65 < 1e-12


def batch_gradient(vae, x, z, batch):
    """∇_Θ of the scaled log joint of some rows at given latents, through the library's model and plate."""
    batch = list(batch)
    conditioned = pyro.condition(vae.model, {"z": z[batch]})
    joint = pyro.poutine.trace(conditioned).get_trace(x[batch], size=6).log_prob_sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(joint, list(vae.model.parameters()))])


def test_equation_24_minibatch_gradients_are_unbiased():
    vae, x, z = small_vae(learn_scale=True), torch.randn(6, 6).double(), torch.randn(6, 3).double()
    full = batch_gradient(vae, x, z, range(6))
    without = torch.stack([batch_gradient(vae, x, z, batch) for batch in itertools.combinations(range(6), 2)])
    replaced = torch.stack([batch_gradient(vae, x, z, batch) for batch in itertools.product(range(6), repeat=2)])
    assert (without.mean(0) - full).abs().max() / full.abs().max() < 1e-14
    assert (replaced.mean(0) - full).abs().max() / full.abs().max() < 1e-14
    ratio = without.var(0, correction=0) / replaced.var(0, correction=0)
    assert (ratio[replaced.var(0) > 1e-6] - (6 - 2) / (6 - 1)).abs().max() < 1e-9


def test_equation_25_the_reparameterized_gradient_is_unbiased():
    model = linear_gaussian()
    x = model.sample(1)
    mu, sigma = torch.tensor([0.3, -0.6]).double(), torch.tensor([0.4, 1.1]).double()
    noise = torch.randn(100_000, 2).double()
    # d log p(x | μ + σ ⊙ ε) by μ, for each noise vector; by σ it is that times ε.
    by_mu = (x - model.bias - (mu + sigma * noise) @ model.weight.T) @ model.weight / model.scale**2
    vae = model.as_vae()
    z = (mu + sigma * noise).requires_grad_()
    (by_autograd,) = torch.autograd.grad(vae.decoder(z).log_prob(x).sum(), z)
    assert (by_autograd - by_mu).abs().max() < 1e-10
    exact_mu = ((x - model.bias - mu @ model.weight.T) @ model.weight / model.scale**2).squeeze()
    exact_sigma = -sigma * (model.weight**2).sum(0) / model.scale**2
    for j in range(2):
        assert abs(z_score(by_autograd[:, j], exact_mu[j])) < 5
        assert abs(z_score(by_autograd[:, j] * noise[:, j], exact_sigma[j])) < 5
        assert abs(z_score(by_autograd[:, j] * noise[:, j], exact_sigma[j] / sigma[j])) > 5, "power: a lost σ is seen"


@pytest.mark.parametrize("particles", [1, 7])
@pytest.mark.parametrize("variance", [0.5, 0.04, 3.0])
def test_equation_26_the_printed_objective_is_a_beta_vae(variance, particles):
    vae, x = small_vae(), torch.randn(5, 6).double()
    vae.decoder.fixed_scale.fill_(math.sqrt(variance))
    printed, gradients = loss_and_gradients(
        lambda *args: pv.elbo.note_objective(*args, num_particles=particles), vae, x, 65
    )
    beta = 1 / (2 * variance)

    def beta_vae(model, guide, x, size):
        divergence = kl_divergence(vae.encoder(x), vae.prior()).sum() * size / len(x)
        return Trace_ELBO.differentiable_loss(mean_field, model, guide, x, size) + (beta - 1) * divergence

    mean_field = TraceMeanField_ELBO(num_particles=particles)
    value, beta_gradients = loss_and_gradients(beta_vae, vae, x, 65)
    constant = variance * 6 * math.log(2 * math.pi * variance)
    assert abs(-printed - (2 * variance * -value + 65 * constant)) / 65 < 1e-12
    differences = [(gradients[k] - 2 * variance * beta_gradients[k]).abs().max() for k in gradients]
    assert max(differences) / 65 < 1e-12
    if variance == 0.5:
        elbo, _ = loss_and_gradients(mean_field, vae, x, 65)
        assert abs(-elbo - (-printed - 65 * 3 * math.log(math.pi))) / 65 < 1e-12


def test_equation_26_teaches_nothing_about_s():
    vae, x = small_vae(learn_scale=True), torch.randn(5, 6).double()
    _, gradients = loss_and_gradients(pv.elbo.note_objective, vae, x)
    assert gradients["model.decoder.log_scale"] == 0
    _, gradients = loss_and_gradients(pv.elbo.HandDerivedELBO(), vae, x)
    assert gradients["model.decoder.log_scale"] != 0


def test_equation_26_a_mean_over_pixels_means_a_variance_of_half_the_dimension():
    x, f = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    mean_squared_error = ((x - f) ** 2).mean(1)
    log_density = normal_log_density(x, f, math.sqrt(6 / 2))
    assert (log_density + mean_squared_error).std() < 1e-14


def test_every_equation_has_its_test():
    named = {int(name.split("_")[2]) for name in globals() if name.startswith("test_equation_")}
    assert named == set(range(1, 27))
