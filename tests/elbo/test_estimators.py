"""Every estimator: against Pyro's, under subsampling, and at the exact posterior."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import linear_gaussian, loss_and_gradients, small_vae, z_score
from helpers.members import ESTIMATORS, OBJECTIVES
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, config_enumerate
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae.elbo import (
    CIWAE,
    ELBO,
    IWAE,
    IWAESTL,
    MIWAE,
    PIWAE,
    STL,
    AnalyticKL,
    Beta,
    DReG,
    Estimator,
    FreeBits,
    Linear,
    Renyi,
    ScoreFunction,
    Thermodynamic,
)
from pyro_vae.elbo.estimator import log_mean_exp
from pyro_vae.errors import ModelError, SettingsError

SHARED = {"Estimator", "HandDerivedELBO", "M2", "Trace_ELBO", "TraceMeanField_ELBO"}
"""Exported beside members: the base, and those with tests of their own."""


def made(name: str) -> Estimator:
    return {**ESTIMATORS, **OBJECTIVES}[name]()


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


def test_the_tables_cover_every_exported_estimator():
    exported = {name for name in pv.elbo.__all__ if isinstance(value := getattr(pv.elbo, name), type)
                and issubclass(value, pyro.infer.ELBO)}  # fmt: skip
    assert {name.split(",")[0] for name in (*ESTIMATORS, *OBJECTIVES)} == exported - SHARED


@pytest.mark.parametrize("name", [*ESTIMATORS, *OBJECTIVES])
def test_svi_takes_it_and_learns(name):
    torch.manual_seed(0)
    x = linear_gaussian(features=6, latents=3).sample(40)
    vae, loss = small_vae(), made(name)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    before = pv.train.per_datum_elbo(vae, x, num_particles=50).mean()
    for _ in range(60):
        svi.step(x)
    assert pv.train.per_datum_elbo(vae, x, num_particles=50).mean() > before + 0.5
    assert loss(vae.model, vae.guide)(x).requires_grad, "it works as an ELBO module"
    assert not loss.loss(vae.model, vae.guide, x).requires_grad
    copied = loss.with_particles(6)
    assert (copied.num_particles, type(copied)) == (6, type(loss))
    assert loss.num_particles != 6, "the first one is as it was"
    assert repr(loss).startswith(type(loss).__name__ + "(")


@pytest.mark.parametrize(
    ("ours", "pyros"),
    [
        (ELBO(), Trace_ELBO()),
        (ELBO(5), Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)),
        (AnalyticKL(), TraceMeanField_ELBO()),
        (AnalyticKL(5), TraceMeanField_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)),
    ],
    ids=["sampled", "sampled, five", "analytic", "analytic, five"],
)
@pytest.mark.parametrize("size", [5, 65])
def test_it_equals_pyros_with_the_same_noise(ours, pyros, size):
    vae, x = small_vae(learn_scale=True), torch.randn(5, 6).double()
    value, gradients = loss_and_gradients(ours, vae, x, size)
    theirs, their_gradients = loss_and_gradients(pyros, vae, x, size)
    assert abs(value - theirs) / size < 1e-12
    assert (flat(gradients) - flat(their_gradients)).abs().max() / size < 1e-12
    assert (flat(gradients) - flat(loss_and_gradients(ours, vae, x, size, seed=2)[1])).abs().max() > 1e-3, "power"


def test_renyi_equals_pyros_on_one_datum():
    """Pyro's logarithm is of a batch's product; with one datum, and no n/m, it is right."""
    vae, x = small_vae(), torch.randn(1, 6).double()
    pyros = pyro.infer.RenyiELBO(alpha=0.5, num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(1)
    theirs = pyros.loss_and_grads(vae.model, vae.guide, x)
    their_gradients = {name: p.grad.clone() for name, p in vae.named_parameters()}
    vae.zero_grad()
    value, gradients = loss_and_gradients(Renyi(7, alpha=0.5), vae, x)
    assert value.item() == pytest.approx(theirs, abs=1e-11)
    assert max((gradients[n] - g).abs().max() for n, g in their_gradients.items()) < 1e-11


SAME = [
    (Renyi(5, alpha=0.0), IWAE(5)),
    (Renyi(5, alpha=1.0), ELBO(5)),
    (MIWAE(6, groups=1), IWAE(6)),
    (MIWAE(6, groups=6), ELBO(6)),
    (PIWAE(6, groups=1), IWAE(6)),
    (CIWAE(4, mix=1.0), ELBO(4)),
    (CIWAE(4, mix=0.0), IWAE(4)),
    (DReG(1), STL(1)),
    (IWAESTL(1), STL(1)),
    (IWAE(1), ELBO(1)),
    (Beta(IWAE(3), 1.0), IWAE(3)),
    (FreeBits(ELBO(2), 0.0), ELBO(2)),
]


@pytest.mark.parametrize(("first", "second"), SAME, ids=repr)
def test_their_common_cases_are_the_same(first, second):
    vae, x = small_vae(), torch.randn(5, 6).double()
    value, gradients = loss_and_gradients(first, vae, x, 65)
    other, others = loss_and_gradients(second, vae, x, 65)
    assert abs(value - other) < 1e-10
    assert (flat(gradients) - flat(others)).abs().max() < 1e-10


def test_piwae_learns_theta_as_iwae_and_phi_as_miwae():
    vae, x = small_vae(learn_scale=True), torch.randn(5, 6).double()
    (value, both), (of_iwae, iwae), (_, miwae) = (
        loss_and_gradients(e, vae, x, 65) for e in (PIWAE(8, groups=4), IWAE(8), MIWAE(8, groups=4))
    )
    assert abs(value - of_iwae) < 1e-11
    for name, gradient in both.items():
        assert (gradient - (iwae if name.startswith("model") else miwae)[name]).abs().max() < 1e-10
    assert (flat(iwae) - flat(miwae)).abs().max() > 0.1, "power: they differ"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_at_the_exact_posterior_every_bound_is_the_evidence(name):
    model = linear_gaussian()
    vae, x, loss = model.as_vae(), model.sample(4), made(name)
    if isinstance(loss, AnalyticKL):
        pytest.skip("its value has noise there; see the closed form of its variance")
    value, gradients = loss_and_gradients(loss, vae, x, 400)
    assert abs(value + 100 * model.log_marginal(x).sum()) < 1e-9
    phi = torch.cat([g.flatten() for n, g in gradients.items() if n.startswith("guide")])
    if loss.path_gradient or isinstance(loss, ScoreFunction):
        assert phi.abs().max() < 1e-9, "it sticks the landing"
    else:
        assert phi.abs().max() > 1e-3


class Preset(dist.Normal):
    """A normal whose noise is what it was told, so that a datum has the same noise in any batch."""

    def __init__(self, loc, scale, noise):
        self.noise = noise
        super().__init__(loc, scale)

    def expand(self, batch_shape, _instance=None):
        return Preset(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise.transpose(0, 1)


class PresetNoise(pv.Conditional):
    """The encoder's q, its noise read from behind the data: shape (batch, particles, latent)."""

    def __init__(self, net, particles):
        super().__init__()
        self.net, self.particles = net, particles

    def forward(self, rows):
        x, noise = rows[:, :6], rows[:, 6:]
        loc, log_scale = self.net(x).chunk(2, -1)
        return Preset(loc, log_scale.exp(), noise.unflatten(1, (self.particles, -1))).to_event(1)


def with_preset_noise(particles: int):
    """Model and guide of rows that carry their noise, and six such rows."""
    torch.manual_seed(0)
    vae = small_vae(learn_scale=True)
    encoder = PresetNoise(vae.encoder.net, particles)

    def model(rows, size=None):
        return vae.model(rows[:, :6], size)

    def guide(rows, size=None):
        with pyro.plate("data", len(rows) if size is None else size, subsample=rows):
            pyro.sample("z", encoder(rows))

    parameters = [*vae.model.parameters(), *encoder.parameters()]
    return model, guide, parameters, torch.randn(6, 6 + 3 * particles).double()


def whole_and_mean_of_minibatches(loss: Estimator):
    """The full-data loss and gradient, and their mean over all 20 minibatches of 3 of 6 data."""
    model, guide, parameters, rows = with_preset_noise(loss.num_particles)

    def evaluated(batch):
        value = loss.differentiable_loss(model, guide, batch, 6)
        gradient = torch.autograd.grad(value, parameters)
        return torch.cat([value.detach().reshape(1), *(g.flatten() for g in gradient)])

    batches = [rows[list(index)] for index in itertools.combinations(range(6), 3)]
    return evaluated(rows), torch.stack([evaluated(batch) for batch in batches]).mean(0)


NOT_A_SUM_OVER_DATA = {"FreeBits", "TCVAE", "InfoVAE"}


@pytest.mark.parametrize("name", [n for n in (*ESTIMATORS, *OBJECTIVES) if n not in NOT_A_SUM_OVER_DATA])
def test_minibatches_are_unbiased(name):
    whole, mean = whole_and_mean_of_minibatches(made(name))
    assert (whole - mean).abs().max() < 1e-12 * whole.abs().max().clamp(min=1)


class ScaledInside(IWAE):
    """Pyro's slip: n/m inside the logarithm of the mean."""

    def differentiable_loss(self, model, guide, *args, **kwargs):
        w = self.weigh(model, guide, *args, **kwargs)
        return -log_mean_exp(w.scale * w.log).sum()


def test_planted_a_scale_inside_the_logarithm_is_seen_by_minibatches_and_is_no_bound():
    whole, mean = whole_and_mean_of_minibatches(ScaledInside(3))
    assert (whole - mean).abs().max() > 1e-2
    model = linear_gaussian()
    vae, x = model.as_vae(diagonal=True), model.sample(3)
    vae.encoder.net.bias.data += 1.0
    evidence = 10 * model.log_marginal(x).sum()

    def mean_bound(loss):
        return torch.stack([-loss_and_gradients(loss, vae, x, 30, seed=s)[0] for s in range(200)]).mean()

    assert mean_bound(IWAE(8)) < evidence < mean_bound(ScaledInside(8))


@pytest.mark.parametrize("name", ["ELBO", "STL", "IWAE", "DReG", "MIWAE", "CIWAE", "PIWAE", "VIMCO", "Thermodynamic"])
def test_bounds_lie_below_the_evidence(name):
    """In expectation over 500 draws, ten copies of the data at once; one nat per datum above would be seen (power)."""
    model = linear_gaussian()
    vae, x = model.as_vae(diagonal=True), model.sample(3)
    vae.encoder.net.bias.data += 0.3
    many = x.repeat(10, 1)
    values = torch.stack([-loss_and_gradients(made(name), vae, many, seed=s)[0] for s in range(50)]) / 10
    evidence = model.log_marginal(x).sum()
    assert z_score(values, evidence) < -5
    assert z_score(values + 3, evidence) > 5


def test_what_has_no_log_weight_is_refused_and_told_what_to_use():
    x = torch.randn(5, 6).double()

    def with_global(x, size=None):
        pyro.sample("g", dist.Normal(0.0, 1.0))
        return small_vae().model(x, size)

    def guide_of_global(x, size=None):
        pyro.sample("g", dist.Normal(0.0, 1.0))
        return small_vae().guide(x, size)

    with pytest.raises(ModelError, match=r"site g lies in no plate over data.* use Trace_ELBO"):
        IWAE().loss(with_global, guide_of_global, x)

    def discrete_model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    def discrete_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    with pytest.raises(ModelError, match=r"site k is enumerated.* use TraceEnum_ELBO"):
        ELBO().loss(discrete_model, config_enumerate(discrete_guide, "sequential"), x)
    exact = torch.stack([dist.Normal(k, 1.0).log_prob(x[:, 0]) for k in (0.0, 1.0)]).logsumexp(0) - math.log(2)
    summed = ELBO().loss(discrete_model, config_enumerate(discrete_guide), x)
    assert float(summed) == pytest.approx(-float(exact.sum()))
    with pytest.raises(ModelError, match=r"site k has a Bernoulli, which has no reparam.*ScoreFunction"):
        IWAE().loss(discrete_model, discrete_guide, x)
    ScoreFunction().loss(discrete_model, discrete_guide, x)
    with pytest.raises(ModelError, match="observes no data"):
        ELBO().loss(lambda x: discrete_guide(x), discrete_guide, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELBO(0), "ELBO: num_particles is 0"),
        (lambda: IWAE(2.5), "whole number"),
        (lambda: ScoreFunction(1), "at least 2"),
        (lambda: MIWAE(5, groups=2), "num_particles is 5; it must be a multiple"),
        (lambda: MIWAE(4, groups=2).with_particles(5), "num_particles is 5"),
        (lambda: CIWAE(2, mix=1.5), "mix is 1.5"),
        (lambda: Renyi(2, alpha=float("nan")), "alpha is NaN"),
        (lambda: Thermodynamic(4, partitions=0), "partitions is 0"),
        (lambda: Thermodynamic(4, first=1.0), "first 1.0"),
        (lambda: Beta(ELBO(), -1.0), "beta is -1"),
        (lambda: FreeBits(ELBO(), -1.0), "nats is -1"),
        (lambda: pv.elbo.InfoVAE(ELBO(), alpha=2.0), "alpha is 2"),
        (lambda: Linear(0), "steps is 0"),
        (lambda: pv.elbo.Cyclical(10, ramp=0.0), "ramp 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


class HostSyncs(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: a tensor read as a number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*ESTIMATORS, *OBJECTIVES])
def test_no_step_waits_for_the_device(name):
    vae, x, loss = small_vae(learn_scale=True), torch.randn(5, 6).double(), made(name)
    with pyro.validation_enabled(False), HostSyncs() as syncs:
        loss.loss_and_grads(vae.model, vae.guide, x, 65)
    assert syncs.count == 0
    with pyro.validation_enabled(False), HostSyncs() as syncs:
        Trace_ELBO().loss_and_grads(vae.model, vae.guide, x, 65)
    assert syncs.count > 0, "power: Pyro's own reads numbers"
