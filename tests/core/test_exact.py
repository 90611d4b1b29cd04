"""The oracle against other ways to the same numbers, and quadrature against the oracle."""

import pyro.distributions as dist
import pytest
import torch
from helpers.checks import linear_gaussian, small_vae, z_score
from sklearn.decomposition import PCA

import pyro_vae as pv
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.evidence.exact import LinearGaussian, quadrature_log_marginal


@pytest.fixture(scope="module")
def digits():
    return pv.data.digits().x.double()


@pytest.mark.parametrize(
    ("latents", "variance", "log_likelihood"), [(2, 0.0541170, 0.0057067), (8, 0.0273294, 14.209788)]
)
def test_fit_is_probabilistic_pca_on_digits(digits, latents, variance, log_likelihood):
    model = LinearGaussian.fit(digits, latents)
    assert model.scale**2 == pytest.approx(variance, abs=5e-8)
    assert model.log_marginal(digits).mean() == pytest.approx(log_likelihood, abs=5e-7)
    pca = PCA(latents).fit(digits.numpy())
    n = len(digits)
    assert model.scale**2 == pytest.approx(pca.noise_variance_ * (n - 1) / n, rel=1e-10), "sklearn divides by n - 1"


def test_fit_is_a_maximum(digits):
    best = LinearGaussian.fit(digits, 2)
    top = best.log_marginal(digits).mean()
    for seed in range(5):
        torch.manual_seed(seed)
        step = 0.01 * torch.randn_like(best.weight)
        for other in (
            LinearGaussian(best.weight + step, best.bias, best.scale),
            LinearGaussian(best.weight, best.bias + 0.01 * torch.randn(64).double(), best.scale),
            LinearGaussian(best.weight, best.bias, best.scale * 1.01),
        ):
            assert other.log_marginal(digits).mean() < top


def test_the_elbo_is_tight_for_principal_axes_and_loses_the_diagonal_gap_when_rotated(digits):
    model = LinearGaussian.fit(digits, 8)
    assert (model.elbo(digits, model.best_diagonal(digits)) - model.log_marginal(digits)).abs().max() < 1e-11
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()).Q
    rotated = LinearGaussian(model.weight @ rotation, model.bias, model.scale)
    precision = rotated.precision
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    lost = rotated.log_marginal(digits) - rotated.elbo(digits, rotated.best_diagonal(digits))
    assert gap > 0.1
    assert (lost - gap).abs().max() < 1e-10


@pytest.mark.parametrize("diagonal", [False, True])
def test_as_vae_is_the_same_model(diagonal):
    model = linear_gaussian()
    vae, x = model.as_vae(diagonal=diagonal), model.sample(4)
    q, exact = vae.encoder(x), (model.best_diagonal if diagonal else model.posterior)(x)
    assert (q.mean - exact.mean).abs().max() < 1e-13
    assert (q.variance - exact.variance).abs().max() < 1e-13
    z = torch.randn(4, 2).double()
    expected = dist.Normal(z @ model.weight.T + model.bias, model.scale).to_event(1).log_prob(x)
    assert (vae.decoder(z).log_prob(x) - expected).abs().max() < 1e-13
    again = LinearGaussian.of(vae)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(again.scale, model.scale)
    if not diagonal:
        assert (q.covariance_matrix - model.precision.inverse()).abs().max() < 1e-13


def test_samples_have_the_marginal_covariance():
    model = linear_gaussian()
    x = model.sample(100_000)
    covariance = model.weight @ model.weight.T + model.scale**2 * torch.eye(5)
    centred = x - model.bias
    for i, j in [(0, 0), (1, 1), (0, 1), (3, 4)]:
        assert abs(z_score(centred[:, i] * centred[:, j], covariance[i, j])) < 5
    assert abs(z_score(centred[:, 0] ** 2, covariance[0, 0] - model.scale**2)) > 5, "power: noise left out is seen"


@pytest.mark.parametrize("latents", [1, 2])
def test_quadrature_equals_the_closed_form(latents):
    model = linear_gaussian(latents=latents)
    x = model.sample(6)
    assert (quadrature_log_marginal(model.as_vae(), x) - model.log_marginal(x)).abs().max() < 5e-6
    chunked = quadrature_log_marginal(model.as_vae(), x, chunk_elements=6 * 5 * 100)
    assert (chunked - model.log_marginal(x)).abs().max() < 5e-6


def test_quadrature_of_a_network_is_the_prior_mean_of_its_likelihood():
    vae, x = small_vae(latents=2), torch.randn(1, 6).double()
    with torch.no_grad():
        likelihood = vae.decoder(torch.randn(200_000, 2).double()).log_prob(x).exp()
        truth = quadrature_log_marginal(vae, x).exp()
    assert abs(z_score(likelihood, truth.item())) < 5
    assert abs(z_score(likelihood, 1.05 * truth.item())) > 5, "power: 5 % off is seen"


def test_quadrature_refuses_what_it_cannot_do():
    model = linear_gaussian(latents=3)
    with pytest.raises(ModelError, match="1 or 2 latents, but this VAE has 3"):
        quadrature_log_marginal(model.as_vae(), model.sample(2))
    sharp = LinearGaussian(100 * torch.ones(5, 2).double(), torch.zeros(5).double(), 0.01)
    with pytest.raises(SettingsError, match="too coarse"):
        quadrature_log_marginal(sharp.as_vae(), sharp.sample(3))
    with pytest.raises(SettingsError, match="odd"):
        quadrature_log_marginal(linear_gaussian().as_vae(), linear_gaussian().sample(2), points=10)


@pytest.mark.parametrize("points", [161, 8001])
def test_quadrature_refuses_a_posterior_beyond_its_grid_however_fine(points):
    """x far out puts z at 7.8: cut off at 6, log p(x) would come out 0.3 nats too low."""
    far = LinearGaussian(torch.ones(5, 1).double(), torch.zeros(5).double(), 2.0)
    x = torch.full((1, 5), 14.0).double()
    with pytest.raises(SettingsError, match="increase limit"):
        quadrature_log_marginal(far.as_vae(), x, points=points)
    wide = quadrature_log_marginal(far.as_vae(), x, points=points, limit=14.0)
    assert (wide - far.log_marginal(x)).abs().max() < 5e-6


def test_it_takes_data_of_another_precision():
    model, x = linear_gaussian(), linear_gaussian().sample(3)
    assert (model.log_marginal(x.float()) - model.log_marginal(x)).abs().max() < 1e-5
    assert (model.elbo(x.float(), model.posterior(x.float())) - model.log_marginal(x)).abs().max() < 1e-5


def test_impossible_models_are_refused():
    with pytest.raises(SettingsError, match=r"\(feature, latent\)"):
        LinearGaussian(torch.ones(3), torch.ones(3), 1.0)
    with pytest.raises(SettingsError, match="above 0"):
        LinearGaussian(torch.ones(3, 1), torch.ones(3), 0.0)
    with pytest.raises(SettingsError, match="must be from 1 to 4 for 5 features"):
        LinearGaussian.fit(torch.randn(10, 5), 5)
    with pytest.raises(DataError, match="not finite"):
        LinearGaussian.fit(torch.full((10, 5), torch.nan), 2)
    with pytest.raises(ModelError, match=r"batch shape \(4,\) for 2 data"):
        linear_gaussian().elbo(linear_gaussian().sample(2), linear_gaussian().posterior(linear_gaussian().sample(4)))
    with pytest.raises(DataError, match="fewer latents"):
        LinearGaussian.fit(torch.zeros(10, 5), 2)
    with pytest.raises(ModelError, match="one linear layer"):
        LinearGaussian.of(small_vae())
    with pytest.raises(ModelError, match="normal q"):
        linear_gaussian().elbo(linear_gaussian().sample(2), dist.Laplace(torch.zeros(2, 2), 1.0).to_event(1))
