"""Gradients and bounds against closed forms and the slopes of the papers; planted bugs are seen."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import linear_gaussian, loss_and_gradients
from helpers.members import ESTIMATORS

import pyro_vae as pv
from pyro_vae.elbo import ELBO, IWAE, IWAESTL, STL, VIMCO, AnalyticKL, Beta, DReG, Estimator, Renyi
from pyro_vae.elbo.copies import replace_gradient
from pyro_vae.elbo.estimator import log_mean_exp


def orthogonal():
    """Orthogonal columns, so that the best diagonal normal is the posterior: a = ‖w_j‖² / s², σ² = 1 / (1 + a)."""
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(5, 2).double()).Q * torch.tensor([2.0, 1.0])
    model = pv.exact.LinearGaussian(weight, torch.zeros(5).double(), 0.8)
    a = torch.tensor([4.0, 1.0]).double() / 0.64
    return model, a, 1 / (1 + a)


def gradients_by_mean(loss: Estimator, replicates: int):
    """The bound and its gradient by μ in many independent replicates of one datum at the exact posterior."""
    model, *_ = orthogonal()
    vae, x = model.as_vae(diagonal=True), model.sample(1)
    loc = vae.encoder(x).mean.detach().expand(replicates, 2).clone().requires_grad_()
    scale = vae.encoder(x).stddev.detach()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    torch.manual_seed(3)
    w = loss.weigh(vae.model, guide, x.expand(replicates, -1))
    bound = loss.bound(w)
    return bound.detach(), torch.autograd.grad(bound.sum(), loc)[0], model.posterior(x).mean[0]


def variance_z(values, exact):
    """How many standard errors a sample variance of normal-like values is from a number."""
    squares = (values - values.mean(0)) ** 2
    return (squares.mean(0) - exact) / (squares.std(0) / math.sqrt(len(values)))


@pytest.mark.parametrize(
    ("loss", "variance"),
    [
        (ELBO(), lambda a, s2: 1 / s2),
        (AnalyticKL(), lambda a, s2: a**2 * s2),
        (STL(), lambda a, s2: torch.zeros(2).double()),
    ],
    ids=["ELBO", "AnalyticKL", "STL"],
)
def test_the_gradients_variance_at_the_posterior_is_its_closed_form(loss, variance):
    """1/σ², a²σ² and 0 (references.md); 10 % off is seen with 40,000 replicates (power)."""
    _, a, s2 = orthogonal()
    _, gradient, _ = gradients_by_mean(loss, 40_000)
    if isinstance(loss, STL):
        assert gradient.abs().max() < 1e-12
        return
    assert variance_z(gradient, variance(a, s2)).abs().max() < 5
    assert variance_z(gradient, 1.1 * variance(a, s2)).abs().min() > 5


def test_the_values_variance_at_the_posterior_is_its_closed_form():
    """Trace 0; analytic KL Σ ½ (aσ²)² + m²σ² (references.md)."""
    _, a, s2 = orthogonal()
    value, _, m = gradients_by_mean(AnalyticKL(), 40_000)
    exact = (0.5 * (a * s2) ** 2 + m**2 * s2).sum().item()
    assert abs(variance_z(value, exact)) < 5
    assert abs(variance_z(value, 1.15 * exact)) > 5
    assert gradients_by_mean(ELBO(), 100)[0].std() < 1e-12


class Rainforth:
    """The model of Rainforth et al. (2018): z ~ N(μ, I), x ~ N(z, I), q = N(z | x / 2 + b, 2/3 I), near its optimum."""

    D = 20

    def __init__(self, replicates: int, spread: float = 0.01) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (replicates, self.D)

        def around(value):
            moved = value + spread * torch.randn(self.D, generator=generator, dtype=torch.float64)
            return moved.expand(shape).clone().requires_grad_()

        self.x = (2**0.5 * torch.randn(self.D, generator=generator, dtype=torch.float64)).expand(shape)
        self.mu, self.b = around(0.0), around(0.0)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.b, (2 / 3) ** 0.5).to_event(1))

    def gradients(self, loss: Estimator, seed: int = 1):
        """By μ (Θ) and b (φ), a row for each replicate."""
        torch.manual_seed(seed)
        bound = loss.bound(loss.weigh(self.model, self.guide, self.x))
        return torch.autograd.grad(bound.sum(), [self.mu, self.b])


def slope(particles, ratios):
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (particles, ratios))
    return ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()


def test_signal_to_noise_slopes_are_those_of_rainforth_and_tucker():
    """In K ≥ 16: IWAE +½ by Θ and -½ by φ, DReG +½ by φ; the signal by φ is |E DReG|, whose noise is least."""
    case, particles = Rainforth(1500), (16, 64, 256)
    ratios = {"IWAE Θ": [], "IWAE φ": [], "DReG φ": []}
    for k in particles:
        by_theta, by_phi = case.gradients(IWAE(k))
        _, doubly = case.gradients(DReG(k), seed=2)
        signal = doubly.mean(0).abs()
        ratios["IWAE Θ"].append((by_theta.mean(0).abs() / by_theta.std(0)).mean().item())
        ratios["IWAE φ"].append((signal / by_phi.std(0)).mean().item())
        ratios["DReG φ"].append((signal / doubly.std(0)).mean().item())
    slopes = {name: slope(particles, values).item() for name, values in ratios.items()}
    assert slopes["IWAE Θ"] == pytest.approx(0.5, abs=0.06)
    assert slopes["IWAE φ"] == pytest.approx(-0.5, abs=0.1)
    assert slopes["DReG φ"] == pytest.approx(0.5, abs=0.12)


def unbiased_by_phi(loss: Estimator, particles: int, replicates: int = 40_000):
    """z-scores of the mean gradient by φ against that of IWAE with other noise, and the relative distance."""
    case = Rainforth(replicates, spread=0.5)  # farther from the optimum, where the bias of a wrong factor is larger
    mine, naive = case.gradients(loss)[1], case.gradients(IWAE(particles), seed=2)[1]
    apart = mine.mean(0) - naive.mean(0)
    return apart / ((mine.var(0) + naive.var(0)) / replicates).sqrt(), apart.norm() / naive.mean(0).norm()


@pytest.mark.parametrize("loss", [DReG(4), VIMCO(4)], ids=repr)
def test_gradients_by_phi_are_unbiased_for_the_importance_weighted_bound(loss):
    z, _ = unbiased_by_phi(loss, 4)
    assert z.abs().max() < 5


class DReGUnsquared(DReG):
    """The factor of DReG forgotten: shares, not their squares."""

    def bound(self, w):
        return replace_gradient(log_mean_exp(w.log), (w.log.detach().softmax(0) * w.log).sum(0))


@pytest.mark.parametrize("loss", [DReGUnsquared(4), IWAESTL(4)], ids=repr)
def test_planted_the_dreg_factor_flipped_is_seen_as_bias(loss):
    """It is then the path-only gradient of IWAE, known to be biased."""
    z, _ = unbiased_by_phi(loss, 4)
    assert z.abs().max() > 10


def test_iwae_with_the_path_gradient_is_biased_and_says_so():
    case = Rainforth(20_000)
    mean = {type(e): case.gradients(e, seed=s)[1].mean(0) for s, e in enumerate((IWAESTL(16), DReG(16)))}
    assert (mean[IWAESTL] - mean[DReG]).norm() > 5 * mean[DReG].norm(), "its bias is many times the gradient"
    assert "Tucker" in IWAESTL(4).known_bias
    assert all(not ESTIMATORS[name]().known_bias for name in ESTIMATORS if name != "IWAESTL")


def test_dreg_has_far_less_variance_by_phi_than_iwae_and_more_so_with_more_particles():
    case = Rainforth(4000)
    ratios = [
        (case.gradients(IWAE(k))[1].var(0) / case.gradients(DReG(k), seed=2)[1].var(0)).mean().item()
        for k in (1, 4, 16)
    ]
    assert 2 < ratios[0] < ratios[1] / 2 < ratios[2] / 4


def exact_renyi(alpha: float) -> tuple[float, float, float]:
    """In one dimension p(x, z) = c N(z | 0, 1), q = N(μ, s²): the limit of the bound by quadrature, and log p."""
    z = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    q, p = dist.Normal(0.5, 1.3), dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    log_w, log_q = p.log_prob(z) - q.log_prob(z), q.log_prob(z)
    step = math.log((z[1] - z[0]).item())
    if alpha == 1:
        return (log_q.exp() * log_w).sum().item() * math.exp(step), 0.5, 1.3
    return (((1 - alpha) * log_w + log_q).logsumexp(0) + step).item() / (1 - alpha), 0.5, 1.3


def scalar_pair(loc: float, scale: float):
    """The model N(z | 0, 1) with evidence 1, and the guide N(z | loc, scale²), per row."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Delta(torch.zeros((), dtype=torch.float64)), obs=torch.zeros(len(x)).double())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor(loc, dtype=torch.float64), scale))

    return model, guide


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0])
def test_renyi_tends_to_its_closed_form_and_rises_in_k_below_one(alpha):
    limit, loc, scale = exact_renyi(alpha)
    model, guide = scalar_pair(loc, scale)
    x = torch.zeros(2000, 1)

    def mean(particles):
        loss = Renyi(particles, alpha=alpha)
        torch.manual_seed(0)
        values = loss.bound(loss.weigh(model, guide, x))
        return values.mean().item(), (values.std() / len(values) ** 0.5).item()

    (few, _), (many, error) = mean(2), mean(2000)
    assert abs(many - limit) < 5 * error + 2e-3
    assert abs(many - limit - 0.05) > 5 * error + 2e-3, "power"
    if alpha < 1:
        assert few < many


def test_renyi_falls_in_k_above_one():
    model, guide = scalar_pair(0.5, 1.3)
    torch.manual_seed(0)
    few, many = (
        Renyi(k, alpha=1.5).bound(Renyi(k, alpha=1.5).weigh(model, guide, torch.zeros(4000, 1))) for k in (2, 64)
    )
    assert few.mean() > many.mean() + 5 * (few.std() + many.std()) / 4000**0.5


def test_the_importance_weighted_gap_is_half_chi_squared_over_k():
    """K (log p - L_K) → ½ χ²(p‖q), in closed form for normals; forgetting log K is off by nats."""
    model, guide = scalar_pair(0.5, 1.3)
    precision = 2 - 1 / 1.3**2  # of p²/q
    mean = -0.5 / 1.3**2 / precision
    log_integral = math.log(1.3 / precision**0.5) + 0.5 * precision * mean**2 + 0.5 * 0.5**2 / 1.3**2
    half_chi2 = (math.exp(log_integral) - 1) / 2
    torch.manual_seed(0)
    k, rows = 16, torch.zeros(1_500_000, 1)
    values = IWAE(k).bound(IWAE(k).weigh(model, guide, rows))
    gap, error = -k * values.mean(), k * values.std() / len(rows) ** 0.5
    assert abs(gap - half_chi2) < 5 * error + 0.05 * half_chi2
    assert 5 * error < 0.2 * half_chi2, "power: a fifth off is seen"


def test_planted_a_forgotten_log_k_is_above_the_evidence():
    model = linear_gaussian()
    vae, x = model.as_vae(), model.sample(4)

    class NoLogK(IWAE):
        def bound(self, w):
            return w.log.logsumexp(0)

    assert loss_and_gradients(NoLogK(8), vae, x)[0] < -model.log_marginal(x).sum() - 4 * math.log(8) + 1e-9
    assert abs(loss_and_gradients(IWAE(8), vae, x)[0] + model.log_marginal(x).sum()) < 1e-10


def test_planted_the_wrong_log_density_detached_moves_the_gradient():
    """Detaching log p's part instead of log q's: no zero at the posterior, and another mean."""
    model = linear_gaussian()
    vae, x = model.as_vae(), model.sample(4)

    class Wrong(STL):
        def bound(self, w):
            return (w.joint.detach() - w.posterior).mean(0)

    def phi(loss):
        return torch.cat([g.flatten() for n, g in loss_and_gradients(loss, vae, x)[1].items() if n.startswith("guide")])

    assert phi(STL()).abs().max() < 1e-11
    assert phi(Wrong()).abs().max() > 0.1


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dreg_is_unbiased_with_its_kl_weighted_too(beta):
    """β times the score leaves a factor (1 - β) w̃ + β w̃²; without it the bias is tens of standard errors."""

    class Unweighted(DReG):
        def bound(self, w):
            plain = w.tempered(1 / beta)
            object.__setattr__(w, "common_temperature", plain.common_temperature)
            return super().bound(w)

    case = Rainforth(40_000, spread=0.5)
    naive = case.gradients(Beta(IWAE(4), beta), seed=2)[1]
    for loss, right in ((DReG(4), True), (Unweighted(4), False)):
        mine = case.gradients(Beta(loss, beta))[1]
        z = (mine.mean(0) - naive.mean(0)) / ((mine.var(0) + naive.var(0)) / len(mine)).sqrt()
        assert (z.abs().max() < 5) == right
