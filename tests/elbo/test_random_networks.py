"""Dropout in guide and decoder, with two latents: each network runs once, and all parts of a bound share its masks."""

import copy
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import reference_bounds as reference
from helpers.engine_checks import assert_same, both
from helpers.members import ESTIMATORS
from torch import nn

import pyro_vae as pv
from pyro_vae.elbo import Beta, FreeBits
from pyro_vae.errors import ModelError

FEATURES, WIDTH, ROWS, SIZE = 4, 5, 3, 12
NATS = 4.32
"""Above the KL of some latents of either site, below that of others."""


class Dropout(nn.Dropout):
    """Torch's, which keeps the masks that it drew."""

    def __init__(self):
        super().__init__(0.4)
        self.masks = []

    def forward(self, hidden):
        self.masks.append(super().forward(torch.ones_like(hidden)))
        return hidden * self.masks[-1]


class Noted(dist.Normal):
    """A normal that keeps its noise in a list."""

    def __init__(self, loc, scale, noise):
        self.noise = noise
        super().__init__(loc, scale)

    def expand(self, batch_shape, _instance=None):
        return Noted(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        self.noise.append(torch.randn(self.loc.shape, dtype=self.loc.dtype))
        return self.loc + self.scale * self.noise[-1]


class Networks(nn.Module):
    """z₁ ~ N(0, s²), z₂ ~ N(a z₁, 0.7²), x ~ N(f(z₂), 0.6²), with q(z₁ | x) q(z₂ | z₁, x); all of it learns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.theta = nn.ParameterDict({
            "log_scale": torch.tensor([0.1, -0.2]), "slope": torch.tensor([0.8, 1.3]),
            "in": 0.6 * torch.randn(2, WIDTH), "out": 0.6 * torch.randn(WIDTH, FEATURES),
        })  # fmt: skip
        self.phi = nn.ParameterDict({
            "in": 0.5 * torch.randn(FEATURES, WIDTH), "first": 0.5 * torch.randn(WIDTH, 4),
            "next": 0.5 * torch.randn(WIDTH + 2, WIDTH), "second": 0.5 * torch.randn(WIDTH, 4),
        })  # fmt: skip
        self.drop_x, self.drop_first, self.drop_decoder = Dropout(), Dropout(), Dropout()
        self.noise = [], []
        self.double()

    def hidden(self, x, phi, drop):
        return drop(torch.tanh(x @ phi["in"]))

    def first(self, hidden, phi):
        loc, log_scale = (hidden @ phi["first"]).chunk(2, -1)
        return loc, (0.5 * log_scale).exp()

    def second(self, hidden, first, phi, drop):
        both = torch.cat([hidden.expand(*first.shape[:-1], WIDTH), first], -1)
        loc, log_scale = (drop(torch.tanh(both @ phi["next"])) @ phi["second"]).chunk(2, -1)
        return loc, (0.5 * log_scale).exp()

    def decoded(self, second, theta, drop):
        return drop(torch.tanh(second @ theta["in"])) @ theta["out"]

    def model(self, x, size=None):
        pyro.module("networks", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            scale = self.theta["log_scale"].exp()
            first = pyro.sample("first", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
            second = pyro.sample("second", dist.Normal(self.theta["slope"] * first, 0.7).to_event(1))
            mean = self.decoded(second, self.theta, self.drop_decoder)
            pyro.sample("x", dist.Normal(mean, 0.6).to_event(1), obs=x)

    def guide(self, x, size=None):
        pyro.module("networks", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            hidden = self.hidden(x, self.phi, self.drop_x)
            first = pyro.sample("first", Noted(*self.first(hidden, self.phi), self.noise[0]).to_event(1))
            second = self.second(hidden, first, self.phi, self.drop_first)
            pyro.sample("second", Noted(*second, self.noise[1]).to_event(1))


class WrittenOut:
    """Densities and KLs of these networks at given masks, in plain torch."""

    def __init__(self, networks, x, masks):
        self.net, self.x = networks, x
        self.drop_x, self.drop_first, self.drop_decoder = ((lambda h, m=m: h * m) for m in masks)

    def q(self, first, phi):
        hidden = self.net.hidden(self.x, phi, self.drop_x)
        return self.net.first(hidden, phi), self.net.second(hidden, first, phi, self.drop_first)

    def p(self, first, theta):
        scale = theta["log_scale"].exp()
        return (torch.zeros_like(scale), scale), (theta["slope"] * first, torch.tensor(0.7, dtype=torch.float64))

    def drawn(self, noise, phi):
        hidden = self.net.hidden(self.x, phi, self.drop_x)
        loc, scale = self.net.first(hidden, phi)
        first = loc + scale * noise[0]
        loc, scale = self.net.second(hidden, first, phi, self.drop_first)
        return [first, loc + scale * noise[1]]

    def log_likelihood(self, latents, theta):
        mean = self.net.decoded(latents[1], theta, self.drop_decoder)
        return reference.normal_log_prob(self.x, mean, torch.tensor(0.6, dtype=torch.float64)).sum(-1)

    def log_prior(self, latents, theta):
        return self.summed(latents, self.p(latents[0], theta))

    def log_q(self, latents, phi):
        return self.summed(latents, self.q(latents[0], phi))

    def summed(self, latents, normals):
        return sum(reference.normal_log_prob(z, *normal).sum(-1) for z, normal in zip(latents, normals, strict=True))


TAKES_TWO = [name for name in ESTIMATORS if name != "AnalyticKL"]
OBJECTIVES = {
    "alone": lambda elbo: elbo,
    "Beta": lambda elbo: Beta(elbo, 0.6),
    "FreeBits": lambda elbo: FreeBits(elbo, NATS),
    "Beta of FreeBits": lambda elbo: Beta(FreeBits(elbo, NATS), 0.6),
}
PAIRS = [
    (objective, estimator)
    for objective, estimator in itertools.product(OBJECTIVES, TAKES_TWO)
    if "FreeBits" not in objective or not ESTIMATORS[estimator]().reweights_latents
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize(("objective", "estimator"), PAIRS)
def test_two_latents_with_dropout_are_the_reference_in_value_and_gradient(objective, estimator, training):
    networks, x = Networks().train(training), torch.randn(ROWS, FEATURES).double()
    loss = OBJECTIVES[objective](ESTIMATORS[estimator]())
    value = loss.differentiable_loss(networks.model, networks.guide, x, SIZE)
    parameters = list(networks.parameters())
    gradients = torch.autograd.grad(value, parameters)
    drops = networks.drop_x, networks.drop_first, networks.drop_decoder
    assert [len(drop.masks) for drop in drops] == [1, 1, 1], "each network runs once"
    assert (drops[0].masks[0].min() == 0) == training, "power: some of it is dropped"

    program = WrittenOut(networks, x, [drop.masks[0] for drop in drops])
    theta, phi, t = dict(networks.theta), dict(networks.phi), 0.6 if "Beta" in objective else 1.0
    latents = program.drawn([noise[0] for noise in networks.noise], phi)
    bound = reference.surrogate(reference.ESTIMATORS[estimator], program, latents, theta, phi, t)
    if "FreeBits" in objective:
        normals = zip(program.q(latents[0], phi), program.p(latents[0], theta), strict=True)
        missing = reference.free_bits([reference.normal_kl(q, p) for q, p in normals], NATS)
        assert missing > 0.1, "power"
        bound = bound - t * missing
    right = -SIZE / ROWS * bound.sum()
    assert abs(value - right) < 1e-10 * right.abs()
    for mine, theirs in zip(gradients, torch.autograd.grad(right, parameters), strict=True):
        assert (mine - theirs).abs().max() < 1e-10 * theirs.abs().max()
        assert theirs.abs().max() > 1e-3, "power"
    assert loss.loss(networks.model, networks.guide, x, SIZE).isfinite()


@pytest.mark.parametrize("estimator", [name for name in TAKES_TWO if ESTIMATORS[name]().reweights_latents])
def test_free_bits_of_two_latents_refuse_estimators_that_change_the_gradient_by_latents(estimator):
    networks, loss = Networks(), FreeBits(ESTIMATORS[estimator]())
    with pytest.raises(ModelError, match=r"FreeBits with \w+.* takes one latent site, but the guide has first, second"):
        loss.loss(networks.model, networks.guide, torch.randn(ROWS, FEATURES).double())


def test_the_path_gradient_of_three_latents_is_that_of_each_at_fixed_parameters():
    """The slope at z₁ is that at fixed z₂ and z₃, however these were drawn from it."""
    phi = torch.tensor([0.3, 0.7, -0.5], dtype=torch.float64, requires_grad=True)
    x = torch.randn(4).double()

    def chain(x, sample):
        first = sample("a", phi[0] * x, (0.2 * phi[1]).exp())
        second = sample("b", torch.sin(phi[1] * first), (0.1 * first).exp())
        sample("c", phi[2] * second * first + x, (0.3 * phi[0] * second).exp())

    def program(x):
        with pyro.plate("data", len(x)):
            chain(x, lambda name, loc, scale: pyro.sample(name, dist.Normal(loc, scale)))

    def model(x):
        with pyro.plate("data", len(x)):
            a, b, c = (pyro.sample(name, dist.Normal(0 * x, 1.0)) for name in "abc")
            pyro.sample("x", dist.Normal(a + b * c, 1.0), obs=x)

    torch.manual_seed(2)
    log_w = pv.elbo.log_weights(model, program, x, num_particles=3, path_gradient=True)
    weights = torch.randn(3, 4).double()
    (mine,) = torch.autograd.grad((weights * log_w).sum(), phi)

    torch.manual_seed(2)
    drawn = {}
    chain(x, lambda name, loc, scale: drawn.setdefault(name, loc + scale * torch.randn(3, 4, dtype=torch.float64)))
    a, b, c = drawn.values()
    log_p = sum(reference.normal_log_prob(z, torch.zeros(()), torch.ones(()).double()) for z in (a, b, c))
    log_p = log_p + reference.normal_log_prob(x, a + b * c, torch.ones(()).double())
    still = phi.detach()
    normals = (
        (a, still[0] * x, (0.2 * still[1]).exp()),
        (b, torch.sin(still[1] * a), (0.1 * a).exp()),
        (c, still[2] * b * a + x, (0.3 * still[0] * b).exp()),
    )
    log_q = sum(reference.normal_log_prob(*normal) for normal in normals)
    assert (log_w - (log_p - log_q)).abs().max() < 1e-12
    (right,) = torch.autograd.grad((weights * (log_p - log_q)).sum(), phi)
    assert (mine - right).abs().max() < 1e-12 * right.abs().max().clamp(min=1)


ORDINARY = {"ELBO", "STL", "DReG", "PIWAE", "ScoreFunction"}
"""One estimator for each way in which latents are handed on; the others are compiled in the slow tests."""


@pytest.mark.parametrize(
    "estimator", [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow) for name in TAKES_TWO]
)
def test_compiled_steps_with_dropout_are_the_eager_ones(estimator):
    def make():
        networks = copy.deepcopy(Networks())
        for name in ("drop_x", "drop_first", "drop_decoder"):
            setattr(networks, name, nn.Dropout(0.4))
        return networks.model, networks.guide

    x = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(0)).double()
    assert_same(both(make, lambda step: (x, 20), loss=ESTIMATORS[estimator], steps=15))
