"""Likelihoods against exact truth: formulas written out, scipy.stats, quadrature, higher precision."""

import copy
import math
from fractions import Fraction
from functools import partial

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import z_score
from helpers.members import LATENTS, LIKELIHOODS
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae.core.component import masked
from pyro_vae.elbo.kl import base
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.likelihoods import _distributions

ID = nn.Identity()


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Real numbers ---


def test_heteroscedastic_normal_is_torchs():
    out, x = double(4, 10), double(4, 5, seed=1)
    ours = pv.likelihoods.HeteroscedasticNormal(ID, min_scale=0.3)(out)
    truth = torch.distributions.Normal(out[:, :5], 0.3 + out[:, 5:].exp()).log_prob(x).sum(-1)
    assert torch.allclose(ours.log_prob(x), truth, rtol=1e-14)


def test_student_t_and_laplace_are_scipys():
    loc, x = double(4, 5), double(4, 5, seed=1)
    t = pv.likelihoods.StudentT(ID, df=3.5, scale=0.6).double()(loc).log_prob(x)
    assert np.allclose(t, stats.t.logpdf(x, 3.5, loc, 0.6).sum(-1), rtol=1e-14)
    laplace = pv.likelihoods.Laplace(ID, scale=0.5).double()(loc).log_prob(x)
    assert np.allclose(laplace, stats.laplace.logpdf(x, loc, 0.5).sum(-1), rtol=1e-12)


@pytest.mark.parametrize("member", ["Normal", "StudentT", "Laplace"])
def test_a_scale_per_feature_is_learned_for_each(member):
    likelihood = getattr(pv.likelihoods, member)(ID, scale=0.5, per_feature=3).double()
    assert likelihood.log_scale.shape == likelihood.scale.shape == (3,)
    x = torch.tensor([[0.1, 1.0, 5.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(likelihood(torch.zeros(1, 3).double()).log_prob(x).sum(), likelihood.log_scale)
    assert gradient[0] < 0 < gradient[2], "a narrow one for what is near, a wide one for what is far"
    with pytest.raises(ModelError, match="gives 4 features but per_feature is 3"):
        likelihood(torch.zeros(1, 4).double())


@pytest.mark.parametrize("member", [pv.likelihoods.Normal, pv.likelihoods.StudentT, pv.likelihoods.Laplace])
def test_per_feature_true_takes_the_networks_outputs(member):
    likelihood = member(pv.nn.mlp(2, [8], 5), per_feature=True)
    assert likelihood.per_feature == 5
    assert likelihood.log_scale.shape == (5,)
    assert likelihood(torch.zeros(4, 2)).event_shape == (5,)
    assert not member(ID, per_feature=False).learn_scale
    with pytest.raises(SettingsError, match=r"\(Identity\) has no linear layer .* pass .* as per_feature=5"):
        member(ID, per_feature=True)


def test_images_keep_their_shape():
    net = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(-1, (3, 4)))
    for likelihood in (pv.likelihoods.Normal(net), pv.likelihoods.Bernoulli(net), pv.likelihoods.Poisson(net)):
        assert likelihood(torch.zeros(5, 2)).event_shape == (3, 4)
    assert pv.likelihoods.HeteroscedasticNormal(net)(torch.zeros(5, 2)).event_shape == (3, 2)


# --- The continuous Bernoulli ---

NEAR = [0.0, 1e-8, -1e-6, 1e-4, -1e-3, 4e-3, -0.01, 0.1, -0.5, 0.999, 1.0, 1.001, -1.3, 3.0, -12.0, 40.0, -90.0]


def cb(logits, dtype=torch.float32):
    return _distributions.ContinuousBernoulli(logits=torch.tensor(logits, dtype=dtype))


def series(logit):
    """log C(λ), the mean and the derivative of the mean by the logit, in fractions: no digit is lost."""
    import mpmath

    with mpmath.workdps(60):
        h = mpmath.mpf(logit) / 2
        if h == 0:
            return math.log(2), 0.5, 1 / 12
        partition = h + mpmath.log(mpmath.sinh(h) / h)
        mean = (1 + mpmath.coth(h) - 1 / h) / 2
        variance = (h**-2 - mpmath.csch(h) ** 2) / 4
        return float(mpmath.log1p(mpmath.exp(2 * h)) - partition), float(mean), float(variance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)
def test_the_continuous_bernoulli_is_right_about_one_half(dtype, tolerance):
    logits = cb(NEAR, dtype).logits.double().tolist()  # as they are once rounded
    norm, mean, variance = np.array([series(logit) for logit in logits]).T
    d = cb(NEAR, dtype)
    size = 1 + np.abs(logits)  # a logit of 90 has its own rounding error
    assert (np.abs(d._cont_bern_log_norm().double().numpy() - norm) < tolerance * size).all()
    assert (np.abs(d.mean.double().numpy() - mean) < tolerance).all()
    assert (np.abs(d.variance.double().numpy() - variance) < 2 * tolerance).all()


def test_torchs_own_is_not():
    """What this class is for: the same check fails with torch's continuous Bernoulli."""
    logits = torch.linspace(4.1e-3, 0.02, 50)
    torchs = torch.distributions.ContinuousBernoulli(logits=logits)
    norm, mean, _ = np.array([series(logit) for logit in logits.double().tolist()]).T
    assert np.abs(torchs._cont_bern_log_norm().numpy() - norm).max() > 3e-6
    assert np.abs(torchs.mean.numpy() - mean).max() > 1e-5


def test_its_coefficients_are_those_of_log_sinh():
    """Σ cₙ y ⁿ = log S(y), so S · (Σ n cₙ yⁿ⁻¹) = S', with S = Σ yⁿ / (2n + 1)!; in exact fractions."""
    s = [Fraction(1, math.factorial(2 * n + 1)) for n in range(10)]
    c = [Fraction(0)]
    for n in range(1, 9):
        c.append((n * s[n] - sum(k * c[k] * s[n - k] for k in range(1, n))) / n)
    assert [float(f) for f in c[1:]] == list(_distributions.SERIES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str)
def test_its_gradient_is_x_minus_the_mean(dtype, tolerance):
    logits = torch.tensor(NEAR, dtype=dtype, requires_grad=True)
    x = torch.linspace(0, 1, len(NEAR), dtype=dtype)
    log_prob = _distributions.ContinuousBernoulli(logits=logits).log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    truth = np.array([series(logit)[1] for logit in logits.detach().double().tolist()])
    assert np.abs(gradient.double().numpy() - (x.double().numpy() - truth)).max() < tolerance
    mean = _distributions.ContinuousBernoulli(logits=logits).mean
    (slope,) = torch.autograd.grad(mean.sum(), logits)
    assert slope.isfinite().all()


@pytest.mark.parametrize("logit", [0.0, 1e-5, -3e-3, 0.3, -2.0, 15.0])
def test_it_integrates_to_one_and_its_mean_by_quadrature(logit):
    node, weight = np.polynomial.legendre.leggauss(60)
    x, weight = torch.tensor(node / 2 + 0.5), torch.tensor(weight / 2)
    d = cb(logit, torch.float64)
    p = d.log_prob(x).exp()
    assert abs((weight * p).sum() - 1) < 1e-12
    assert abs((weight * p * x).sum() - d.mean) < 1e-12
    assert abs(d.mean - d.probs) > 1e-2 or abs(logit) < 0.1, "E[x] is not λ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_its_quantiles_invert_its_cdf(dtype):
    d = cb([[logit] for logit in NEAR if abs(logit) < 20], dtype)
    u = torch.linspace(0.01, 0.99, 9, dtype=dtype)
    tolerance = {"atol": 2e-6 if dtype is torch.float32 else 1e-7, "rtol": 0}
    assert torch.allclose(d.cdf(d.icdf(u)), u.expand(len(d.logits), -1), **tolerance)


def test_its_samples_have_its_mean():
    """Also about ½, where torch's samples are uniform; means 0.01 sd off are seen (power)."""
    for logit in (3.9e-3, 0.2, -4.0):
        d = cb(logit, torch.float64)
        x = d.sample((400_000,))
        assert abs(z_score(x, d.mean)) < 5
        assert abs(z_score(x, d.mean + 0.01 * d.stddev)) > 5


def test_a_bernoulli_for_grey_pixels_is_off_by_log_two_each():
    logits, x = torch.zeros(3).double(), torch.tensor([0.2, 0.5, 0.9]).double()
    bernoulli = dist.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum()
    continuous = pv.likelihoods.ContinuousBernoulli(ID)(logits).log_prob(x)
    assert math.isclose(continuous - bernoulli, 3 * math.log(2))


# --- Levels and counts ---


def test_categorical_is_torchs_by_feature():
    out = double(5, 4 * 3)
    x = torch.randint(4, (5, 3), generator=torch.Generator().manual_seed(0))
    p = pv.likelihoods.Categorical(ID, levels=4)(out)
    logits = out.reshape(5, 4, 3).transpose(1, 2)
    truth = torch.distributions.Categorical(logits=logits).log_prob(x).sum(-1)
    assert torch.allclose(p.log_prob(x.double()), truth, rtol=1e-14)
    assert torch.allclose(p.mean, (logits.softmax(-1) * torch.arange(4)).sum(-1))
    assert p.sample().dtype == torch.float64
    assert p.log_prob(x.double().expand(7, 5, 3)).shape == (7, 5)


def test_discretized_logistic_mixture_is_an_explicit_loop():
    levels, components, features = 6, 2, 3
    out = 1.5 * double(3 * components * features)
    p = pv.likelihoods.DiscretizedLogisticMixture(ID, components, levels=levels)(out)
    for x in ([0.0, 0.2, 1.0], [0.6, 1.0, 0.4], [0.8, 0.0, 0.0]):
        total = 0.0
        for j in range(features):
            pi = out[: components * features].reshape(components, features)[:, j].softmax(0)
            q = 0.0
            for k in range(components):
                m = out[components * features + k * features + j].item()
                s = out[2 * components * features + k * features + j].exp().item()
                y, h = 2 * x[j] - 1, 1 / (levels - 1)
                high = 1.0 if x[j] == 1 else stats.logistic.cdf(y + h, m, s)
                low = 0.0 if x[j] == 0 else stats.logistic.cdf(y - h, m, s)
                q += pi[k].item() * (high - low)
            total += math.log(q)
        assert math.isclose(p.log_prob(torch.tensor(x).double()).item(), total, rel_tol=1e-6)  # x is from float32


def test_discretized_logistic_mixture_of_8_bits():
    p = pv.likelihoods.DiscretizedLogisticMixture(ID)(2 * double(2, 15 * 4))
    grid = torch.arange(256, dtype=torch.float64) / 255
    mass = p.base_dist.log_prob(grid[:, None, None].expand(256, 2, 4)).exp()
    assert torch.allclose(mass.sum(0), torch.ones(2, 4).double(), atol=1e-12)
    assert torch.allclose((mass * grid[:, None, None]).sum(0), p.mean)
    x = p.sample((100,))
    assert torch.equal((255 * x).round() / 255, x)
    assert pv.likelihoods.DiscretizedLogisticMixture(ID).feature_support.check(x.float()).all()


@pytest.mark.parametrize("scale", [-60.0, -7.0, 60.0])
def test_far_tails_keep_their_gradient(scale):
    """A narrow logistic far from the value: finite in float32, and the gradient pulls it near."""
    out = torch.tensor([0.0, -1.0, scale], requires_grad=True)
    log_prob = pv.likelihoods.DiscretizedLogisticMixture(ID, 1)(out).log_prob(torch.tensor([200 / 255]))
    (gradient,) = torch.autograd.grad(log_prob, out)
    assert log_prob.isfinite()
    assert gradient.isfinite().all()
    assert gradient[1] > 0 or scale > 0


def test_counts_are_scipys():
    out = double(4, 6)
    a, b = out[:, :3].numpy(), out[:, 3:].numpy()
    x = torch.tensor([0.0, 2.0, 7.0]).double().expand(4, 3)
    binomial = pv.likelihoods.Binomial(ID, 7)(out[:, :3]).log_prob(x)
    assert np.allclose(binomial, stats.binom.logpmf(x, 7, 1 / (1 + np.exp(-a))).sum(-1), rtol=1e-10)
    poisson = pv.likelihoods.Poisson(ID)(out[:, :3]).log_prob(x)
    assert np.allclose(poisson, stats.poisson.logpmf(x, np.exp(a)).sum(-1), rtol=1e-10)
    negative = pv.likelihoods.NegativeBinomial(ID)(out)
    truth = stats.nbinom(np.exp(b), 1 / (1 + np.exp(a)))
    assert np.allclose(negative.log_prob(x), truth.logpmf(x).sum(-1), rtol=1e-10)
    assert np.allclose(negative.mean, truth.mean(), rtol=1e-10)
    assert np.allclose(negative.variance, truth.var(), rtol=1e-10)


def test_a_bernoullis_logit_is_of_a_one():
    logits = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    x = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    truth = stats.bernoulli.logpmf(x, logits.sigmoid().numpy()).sum()
    assert pv.likelihoods.Bernoulli(ID)(logits).log_prob(x).item() == pytest.approx(truth, rel=1e-12)


def test_poissons_of_large_rates_are_scipys():
    log_rate = torch.tensor([8.0, 12.0, -9.0], dtype=torch.float64)
    x = torch.tensor([3000.0, 162_000.0, 0.0], dtype=torch.float64)
    truth = stats.poisson.logpmf(x, log_rate.exp().numpy()).sum()
    assert pv.likelihoods.Poisson(ID)(log_rate).log_prob(x).item() == pytest.approx(truth, rel=1e-10)


CLAMPS = {
    "Poisson, log rate": (pv.likelihoods.Poisson(ID), 0, 20, lambda d: d.rate.log(), [1]),
    "NegativeBinomial, logit": (pv.likelihoods.NegativeBinomial(ID), 0, 20, lambda d: d.logits, [1]),
    "NegativeBinomial, log r": (pv.likelihoods.NegativeBinomial(ID), 1, 20, lambda d: d.total_count.log(), [-1, 1]),
    "DiscretizedLogisticMixture, log s": (
        pv.likelihoods.DiscretizedLogisticMixture(ID, 1), 2, 7, lambda d: d.log_scale.squeeze(-1), [-1, 1],
    ),
}  # fmt: skip
"""The number of a feature that is clamped, its limit, what the distribution has of it, and the sides with a limit."""


@pytest.mark.parametrize("name", CLAMPS)
@pytest.mark.parametrize("side", [-1, 1])
def test_a_clamp_is_where_the_docstring_says(name, side):
    """Up to 0.01 inside the limit a number counts as it is; 0.01 beyond it is the limit, and no gradient flows."""
    likelihood, place, limit, number, sides = CLAMPS[name]
    assert (f"[-{limit}, {limit}]" if len(sides) == 2 else f"at most {limit}") in likelihood.__doc__
    beyond = (limit, 0.0) if side in sides else (limit + 0.01, 1.0)
    for given, expected, slope in [(limit - 0.01, limit - 0.01, 1.0), (limit + 0.01, *beyond)]:
        out = torch.zeros(likelihood.numbers, dtype=torch.float64)
        out[place] = side * given
        found = number(likelihood(out.requires_grad_()).base_dist)
        assert found.item() == pytest.approx(side * expected, abs=1e-12)
        assert torch.autograd.grad(found, out)[0][place] == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("log_scale", [-9.0, -7.0, 7.0, 9.0])
def test_the_widest_and_narrowest_logistic_are_an_explicit_difference(log_scale):
    """The probability of a level, in 50 digits, at the clamped scale."""
    with mpmath.workdps(50):
        s = mpmath.exp(min(max(log_scale, -7), 7))
        below, above = ((mpmath.mpf(2 * 130 + side) / 255 - 1 - mpmath.mpf("0.02")) / s for side in (-1, 1))
        truth = float(mpmath.log(1 / (1 + mpmath.exp(-above)) - 1 / (1 + mpmath.exp(-below))))
    out = torch.tensor([0.0, 0.02, log_scale], dtype=torch.float64)
    x = torch.tensor([130 / 255], dtype=torch.float64)
    found = pv.likelihoods.DiscretizedLogisticMixture(ID, 1)(out).log_prob(x).item()
    assert found == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("log_rate", [-25.0, -20.0, 20.0, 25.0])
def test_the_largest_and_smallest_rate_are_scipys(log_rate):
    rate, x = math.exp(min(log_rate, 20)), 3.0
    found = pv.likelihoods.Poisson(ID)(torch.tensor([log_rate], dtype=torch.float64))
    assert found.log_prob(torch.tensor([x]).double()).item() == pytest.approx(stats.poisson.logpmf(x, rate), rel=1e-12)


def test_a_negative_binomial_of_a_huge_total_count_keeps_its_digits_in_single_precision():
    """Its terms are of size r log r = 2e5 and its log-probability about 6; Pyro's own loses 1e-3 and more of it."""
    logits = torch.linspace(-6, 1, 40)
    out = torch.cat([logits, torch.full_like(logits, 10.0)]).requires_grad_()
    x = (math.exp(10) * logits.exp()).round()
    ours = pv.likelihoods.NegativeBinomial(ID)(out).base_dist
    truth = stats.nbinom.logpmf(x.double(), math.exp(10), (-logits.double()).sigmoid().numpy())
    found = ours.log_prob(x)
    assert found.dtype == torch.float32
    assert np.abs(found.detach().double().numpy() - truth).max() < 2e-5
    pyros = dist.NegativeBinomial(out[40:].exp(), logits=out[:40]).log_prob(x).detach().double().numpy()
    assert np.abs(pyros - truth).max() > 1e-3, "power"
    assert torch.autograd.grad(found.sum(), out)[0].isfinite().all()
    assert ours.expand((3, 40)).log_prob(x).shape == (3, 40)


@pytest.mark.parametrize("name", ["Poisson", "NegativeBinomial", "Binomial", "Bernoulli", "ContinuousBernoulli"])
def test_a_wild_network_gives_finite_numbers(name):
    settings = {"total_count": 1} if name == "Binomial" else {}
    for size in (300.0, -300.0):
        p = getattr(pv.likelihoods, name)(ID, **settings)(torch.full((4,), size))
        assert p.log_prob(torch.ones_like(p.mean)).isfinite()
        assert p.mean.isfinite().all()


# --- Blocks ---

KINDS = [
    (partial(pv.likelihoods.Normal, scale=0.5), 2),
    (pv.likelihoods.Bernoulli, 1),
    (pv.likelihoods.NegativeBinomial, 2),
]


def blocks():
    torch.manual_seed(0)
    return pv.likelihoods.Blocks(pv.nn.mlp(3, [8], 7), KINDS).double()


def test_blocks_are_the_sum_of_their_parts():
    likelihood, z = blocks(), double(6, 4, 3)
    x, out = likelihood(z).sample(), likelihood.net(z)
    truth = [
        pv.likelihoods.Normal(ID, 0.5).double()(out[..., :2]).log_prob(x[..., :2]),
        pv.likelihoods.Bernoulli(ID)(out[..., 2:3]).log_prob(x[..., 2:3]),
        pv.likelihoods.NegativeBinomial(ID)(out[..., 3:]).log_prob(x[..., 3:]),
    ]
    assert torch.allclose(likelihood(z).log_prob(x), sum(truth), rtol=1e-13)
    assert likelihood(z).mean.shape == x.shape == (6, 4, 5), "particles in front"
    assert likelihood(z).expand((2, 6, 4)).log_prob(x).shape == (2, 6, 4)


def test_a_mask_drops_columns_of_blocks():
    likelihood, z = blocks(), double(4, 3)
    x = likelihood(z).sample()
    mask = torch.tensor([True, False, True, False, True]).expand(4, 5)
    kept = masked(likelihood(z), mask).log_prob(x)
    assert torch.allclose(kept, likelihood(z).base_dist.log_prob(x)[:, [0, 2, 4]].sum(-1))
    assert torch.equal(masked(likelihood(z), mask).log_prob(torch.where(mask, x, 0.0)), kept), "whatever stands there"


def test_blocks_are_copied_saved_and_reached_by_gradients():
    torch.manual_seed(0)
    likelihood = pv.likelihoods.Blocks(nn.Linear(3, 3), [(partial(pv.likelihoods.Laplace, per_feature=2), 2), KINDS[1]])
    x = likelihood(torch.zeros(4, 3)).sample()
    gradients = torch.autograd.grad(likelihood(torch.ones(4, 3)).log_prob(x).sum(), list(likelihood.parameters()))
    assert len(gradients) == 3
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    copied = copy.deepcopy(likelihood)
    copied.load_state_dict(likelihood.state_dict())
    assert torch.equal(copied(torch.ones(4, 3)).log_prob(x), likelihood(torch.ones(4, 3)).log_prob(x))


def test_blocks_train_in_a_vae():
    torch.manual_seed(0)
    x = blocks()(double(40, 3)).sample().float()
    decoder = pv.likelihoods.Blocks(pv.nn.mlp(2, [8], pv.likelihoods.Blocks.outputs(5, blocks=KINDS)), KINDS)
    encoder = pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 4))
    vae = pv.VAE(prior=pv.priors.StandardNormal(2), decoder=decoder, encoder=encoder)
    before = copy.deepcopy(vae.state_dict())
    pv.fit(vae, x, epochs=2, seed=0)
    assert all(not torch.equal(before[name], value) for name, value in vae.state_dict().items() if "net" in name)


def test_samples_of_blocks_have_their_columns_moments_and_no_correlation():
    """Each column's mean and variance, which are its part's; and columns know nothing of each other."""
    p = blocks()(double(3))
    side, n = p.base_dist, 100_000
    x = p.sample((n,)).detach()
    assert torch.equal(side.mean, torch.cat([part.mean for part in side.parts], -1))
    assert torch.equal(side.variance, torch.cat([part.variance for part in side.parts], -1))
    standard = ((x - side.mean) / side.variance.sqrt()).detach()
    for j in range(5):
        assert abs(z_score(standard[:, j], 0.0)) < 5
        assert abs(z_score(standard[:, j] ** 2, 1.0)) < 5
        assert abs(z_score(1.1 * standard[:, j] ** 2, 1.0)) > 5, "power"
        for i in range(j):
            assert abs(z_score(standard[:, i] * standard[:, j], 0.0)) < 5
            assert abs(z_score(standard[:, i] * standard[:, j], 0.05)) > 5, "power"


# --- What a likelihood takes ---


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_a_grid_takes_its_values_in_single_precision_and_nothing_between(levels):
    grid = _distributions.grid(levels)
    index = torch.arange(levels, dtype=torch.float32)
    assert grid.check(index / (levels - 1)).all()
    for off in (0.02, 0.5, 0.98):
        assert not grid.check((index[:-1] + off) / (levels - 1)).any()
    assert grid.check((index[:-1] + 0.005) / (levels - 1)).all(), "rounding is forgiven"


def test_taking_names_what_fits():
    everywhere = {"HeteroscedasticNormal", "Laplace", "Normal", "StudentT"}
    counts = {"Binomial", "Categorical", "NegativeBinomial", "Poisson"}
    grey = {"ContinuousBernoulli", "DiscretizedLogisticMixture"}

    def taking(*values):
        return set(pv.likelihoods.taking(torch.tensor([values])))

    assert taking(0.0, 1.0, math.nan) == everywhere | counts | grey | {"Bernoulli"}
    assert taking(0.0, 7.0) == everywhere | counts
    assert taking(0.0, 100 / 255) == everywhere | grey
    assert taking(0.0, 0.3001) == everywhere | {"ContinuousBernoulli"}
    assert taking(-1.0, 3.0) == everywhere
    assert taking(math.inf, 3.0) == set()


REFUSED = {
    "counts under Bernoulli": (
        pv.likelihoods.Bernoulli(ID),
        7.0,
        "row 1, column 'b' is 7, but Bernoulli takes 0 and 1",
    ),
    "a negative under Poisson": (pv.likelihoods.Poisson(ID), -2.0, "is -2, but Poisson takes whole numbers from 0"),
    "a fraction under Binomial": (pv.likelihoods.Binomial(ID, 9), 0.5, "is 0.5, but Binomial takes whole numbers .* 9"),
    "a level beyond": (pv.likelihoods.Categorical(ID, 3), 3.0, "is 3, but Categorical takes whole numbers from 0 to 2"),
    "a grey value above 1": (pv.likelihoods.ContinuousBernoulli(ID), 1.5, "is 1.5, but .* takes numbers from 0 to 1"),
    "off the grid": (pv.likelihoods.DiscretizedLogisticMixture(ID), 0.3, "is 0.3, but .* the 256 values k/255"),
    "just above 1": (pv.likelihoods.ContinuousBernoulli(ID), 1.0000001, "is 1.00000012, but"),
    "infinite": (pv.likelihoods.Normal(ID), math.inf, "is inf, but Normal takes finite numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_cannot_be_are_refused_by_place(name):
    likelihood, value, message = REFUSED[name]
    x = torch.tensor([[0.0, 1.0, math.nan], [1.0, value, 1.0]])
    with pytest.raises(DataError, match=message) as caught:
        likelihood.refuse(x, "a.csv", ["a", "b", "c"])
    text = str(caught.value)
    assert text.startswith("a.csv: row 1, column 'b'")
    assert "1 of 6 values is invalid" in text
    assert "\n" not in text
    fitting = pv.likelihoods.taking(x)
    assert all(other in text for other in fitting if other != type(likelihood).__name__)
    likelihood.refuse(x[:1])  # with a missing value
    with pytest.raises(DataError, match="data: row 1, column 1 is"):
        likelihood.refuse(x)


def test_blocks_refuse_with_their_own_column():
    x = torch.zeros(3, 5)
    blocks().refuse(x)
    x[2, 4] = -1
    with pytest.raises(DataError, match=r"row 2, column 4 is -1, but NegativeBinomial takes .*1 of 6 values"):
        blocks().refuse(x)
    with pytest.raises(DataError, match="column 'e' is -1"):
        blocks().refuse(x, columns=list("abcde"))
    with pytest.raises(ModelError, match="5 columns but the data 4"):
        blocks().refuse(x[:, :4])


# --- Mistakes, in one sentence ---


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.Normal(ID, 0.0),
        lambda p: p.Normal(ID, math.nan),
        lambda p: p.Normal(ID, per_feature=0),
        lambda p: p.HeteroscedasticNormal(ID, min_scale=-1.0),
        lambda p: p.StudentT(ID, 2.0),
        lambda p: p.StudentT(ID, scale=-1.0),
        lambda p: p.Laplace(ID, math.inf),
        lambda p: p.Categorical(ID, 1),
        lambda p: p.Categorical(ID, 2.5),
        lambda p: p.Categorical.outputs(3),
        lambda p: p.DiscretizedLogisticMixture(ID, 0),
        lambda p: p.DiscretizedLogisticMixture(ID, levels=1),
        lambda p: p.Binomial(ID, 0),
        lambda p: p.Blocks(ID, []),
        lambda p: p.Blocks(ID, [p.Normal]),
        lambda p: p.Blocks(ID, [(nn.ReLU, 1)]),
        lambda p: p.Blocks(ID, [(p.Normal, 0)]),
        lambda p: p.Blocks(ID, [(lambda net: p.Blocks(net, [(p.Normal, 1)]), 1)]),
        lambda p: p.Blocks(ID, [(p.Categorical, 5)]),
        lambda p: p.Blocks(ID, [(p.Normal(ID), 2)]),
        lambda p: p.Blocks.outputs(3),
        lambda p: p.Blocks.outputs(3, blocks=[(p.Normal, 2)]),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(SettingsError) as caught:
        make(pv.likelihoods)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (pv.likelihoods.HeteroscedasticNormal(ID), "gives 5 outputs; .* HeteroscedasticNormal needs 2"),
        (pv.likelihoods.NegativeBinomial(ID), "NegativeBinomial needs 2"),
        (pv.likelihoods.Categorical(ID, 3), "Categorical needs 3"),
        (pv.likelihoods.DiscretizedLogisticMixture(ID), "needs 15"),
        (pv.likelihoods.Blocks(ID, KINDS), "gives 5 outputs and the blocks need 7"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outputs_that_cannot_be_shared_out_are_refused(likelihood, message):
    with pytest.raises(ModelError, match=message):
        likelihood(torch.zeros(2, 5))


def test_a_context_is_fed_to_the_network():
    likelihood = pv.likelihoods.Poisson(nn.Linear(2 + 3, 4))
    z, context = torch.randn(7, 5, 2), torch.randn(5, 3)
    joined = likelihood.net(torch.cat([z, context.expand(7, 5, 3)], -1))
    assert torch.equal(likelihood(z, context).mean, joined.exp())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_what_values_a_feature_may_have_is_asked_feature_by_feature(name):
    """Over any leading dimensions: the support of one feature has no event dimension."""
    likelihood = LIKELIHOODS[name]().double()
    z = torch.randn(2, 3, LATENTS).double()
    x = likelihood(z).sample()
    assert base(likelihood(z)).support.event_dim == 0
    holds = likelihood.feature_support.check(x)
    assert holds.shape == x.shape
    assert holds.all()
