"""Each estimator and objective against a second implementation, in value and in its gradients by Θ and φ.

The noise is the library's own: the first draws of the guide are recorded and handed to the reference.
"""

import math
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import reference_bounds as bounds
from helpers import reference_elbos as reference
from helpers import reference_models
from helpers.members import estimator
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import nn

import pyro_vae as pv
from pyro_vae import elbo

N, FEATURES, LATENTS, CONTEXT = 5, 4, 2, 3


@dataclass
class World:
    """A Pyro program with its data, its parameters, and the reference model of the latents that its guide drew."""

    model: object
    guide: object
    given: tuple
    theta: dict
    phi: dict
    reference: object
    prior_draws: list | None = None


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def net(given, outputs):
    return nn.Sequential(nn.Linear(given, 7), nn.Tanh(), nn.Linear(7, outputs))


def named(module):
    return dict(module.named_parameters())


def leaves(**values):
    return {name: value.requires_grad_() for name, value in values.items()}


class RecordedNormal(dist.Normal):
    """A normal that notes what it draws."""

    notes: list

    def expand(self, batch_shape, _instance=None):
        new = RecordedNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))
        new.notes = self.notes
        return new

    def rsample(self, sample_shape=()):
        self.notes.append(draw := super().rsample(sample_shape))
        return draw

    def sample(self, sample_shape=()):
        self.notes.append(draw := super().sample(sample_shape))
        return draw


class RecordedPrior(pv.priors.StandardNormal):
    def __init__(self, latents):
        super().__init__(latents)
        self.notes = []

    def forward(self, context=None):
        prior = RecordedNormal(self.loc, self.scale)
        prior.notes = self.notes
        return prior.to_event(1)


def of_vae(prior="learned", *, context=False, mask=False, size=None):
    behind = CONTEXT if context else 0
    priors = {
        "standard": lambda: pv.priors.StandardNormal(LATENTS),
        "recorded": lambda: RecordedPrior(LATENTS),
        "learned": lambda: pv.priors.Normal(LATENTS),
        "of the context": lambda: pv.priors.ContextNormal(net(CONTEXT, 2 * LATENTS)),
        "of pseudo-inputs": lambda: pv.priors.VampPrior(double(9, FEATURES), components=3),
    }
    vae = pv.VAE(
        prior=priors[prior](),
        decoder=pv.likelihoods.Normal(net(LATENTS + behind, FEATURES), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(net(FEATURES + behind, 2 * LATENTS)),
    ).double()
    for parameter in (vae.model.decoder.log_scale, *(vae.prior.parameters() if prior == "learned" else ())):
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, c = 1.5 * double(N, FEATURES), double(N, CONTEXT) if context else None
    m = torch.rand(N, FEATURES) > 0.4 if mask else None
    describe = partial(reference_models.vae, context=c, mask=m, scale=(size or N) / N)
    notes = vae.prior.notes if prior == "recorded" else None
    return World(vae.model, vae.guide, (x, size, c, m), named(vae.model), named(vae.guide), describe, notes)


def of_two_latents(size=13):
    theta = leaves(loc=double(2), log_scale=0.3 * double(2), a=double(2), weight=double(FEATURES, 2))
    phi = leaves(
        first=0.4 * double(2, FEATURES),
        spread=0.4 * double(2, FEATURES),
        second=double(2, 2),
        skip=0.3 * double(2, FEATURES),
        log_scale=0.3 * double(2),
    )

    def model(x):
        with pyro.plate("data", size, subsample=x):
            one = pyro.sample("one", dist.Normal(theta["loc"], theta["log_scale"].exp()).to_event(1))
            two = pyro.sample("two", dist.Normal(theta["a"] * one, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(two @ theta["weight"].T, 0.6).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", size, subsample=x):
            scale = (0.3 * x @ phi["spread"].T).exp()
            one = pyro.sample("one", dist.Normal(x @ phi["first"].T, scale).to_event(1))
            loc = one @ phi["second"].T + x @ phi["skip"].T
            pyro.sample("two", dist.Normal(loc, phi["log_scale"].exp()).to_event(1))

    describe = partial(reference_models.hierarchy, scale=size / N)
    return World(model, guide, (double(N, FEATURES),), theta, phi, describe)


def of_inner_plates(data_dim=-1, size=13, pixels=False):
    """Latents in a plate of their own inside the data; with ``pixels`` the features stand in another plate there."""
    theta = leaves(
        weight=double(3),
        log_scale=0.3 * double(3),
        prior_loc=double(1)[0],
        prior_log_scale=0.3 * double(1)[0],
    )
    phi = leaves(loc=0.4 * double(2, 3), log_scale=0.3 * double(2))
    inner_dim = -3 - data_dim

    def turned(value):
        """(…, data, inner) as the plates stand, and back."""
        return value if data_dim == -2 else value.transpose(-1, -2)

    def model(x):
        with pyro.plate("data", size, subsample=x, dim=data_dim):
            with pyro.plate("inner", 2, dim=inner_dim):
                z = turned(pyro.sample("z", dist.Normal(theta["prior_loc"], theta["prior_log_scale"].exp())))
            mean, scale = theta["weight"] * (z[..., :1] + 2 * z[..., 1:]), theta["log_scale"].exp()
            if pixels:
                with pyro.plate("pixels", 3, dim=inner_dim):
                    pyro.sample("x", dist.Normal(turned(mean), turned(scale.expand_as(mean))), obs=turned(x))
            else:
                own = -3 if data_dim == -1 else -2  # where the latents' plate has its dimension
                pyro.sample("x", dist.Normal(mean.unsqueeze(own), scale).to_event(1), obs=x.unsqueeze(own))

    def guide(x):
        with pyro.plate("data", size, subsample=x, dim=data_dim), pyro.plate("inner", 2, dim=inner_dim):
            loc = x @ phi["loc"].T
            pyro.sample("z", dist.Normal(turned(loc), turned(phi["log_scale"].exp().expand_as(loc))))

    def describe(theta, phi, x, drawn):
        return reference_models.inner_plates(theta, phi, x, tuple(turned(z) for z in drawn), scale=size / N)

    return World(model, guide, (double(N, 3),), theta, phi, describe)


WORLDS = {
    "all data": of_vae,
    "n/m": partial(of_vae, size=13),
    "mask, n/m": partial(of_vae, mask=True, size=13),
    "context": partial(of_vae, "of the context", context=True),
    "context and mask, n/m": partial(of_vae, "of the context", context=True, mask=True, size=13),
    "two latents": of_two_latents,
    "inner plates": of_inner_plates,
    "inner plates to the right": partial(of_inner_plates, -2),
}

FURTHER = {
    **{f"Renyi, {alpha:g}": bounds.row(bounds.renyi, alpha=alpha) for alpha in (-0.5, 0.3, 1.0, 2.5, math.inf)},
    "MIWAE, of six": bounds.row(bounds.miwae, 6, groups=2),
    "PIWAE, of six": bounds.row(bounds.piwae, 6, groups=2),
    "Thermodynamic, from 0.1": bounds.row(bounds.thermodynamic, 4, partitions=3, first=0.1),
}
"""More settings of estimators of the table."""


def by_paper(name):
    return partial(reference.estimator, row=bounds.ESTIMATORS[name])


ESTIMATORS = {
    name: (estimator(name, row), partial(reference.estimator, row=row))
    for name, row in {**bounds.ESTIMATORS, **FURTHER}.items()
}
ESTIMATORS["AnalyticKL, not strict"] = (elbo.AnalyticKL(3, strict=False), by_paper("AnalyticKL"))

BY_HAND = {
    "HandDerivedELBO": (elbo.HandDerivedELBO(3), by_paper("AnalyticKL")),
    "HandDerivedELBO, all at once": (elbo.HandDerivedELBO(3, vectorize_particles=True), by_paper("AnalyticKL")),
    "note_objective": (partial(elbo.note_objective, num_particles=3), reference.printed),
}


def drawn_by(world, loss):
    """The loss, and the values of each latent, of all particles."""
    runs = []

    def guide(*given):
        trace = prune_subsample_sites(poutine.trace(world.guide).get_trace(*given))
        runs.append([trace.nodes[name]["value"].detach() for name in trace.stochastic_nodes])

    value = getattr(loss, "differentiable_loss", loss)(world.model, guide, *world.given)
    if runs[-1][0].dim() == 2:  # particle by particle
        return value, tuple(torch.stack(values) for values in zip(*runs, strict=True))
    return value, tuple(runs[-1])


def assert_same(world, loss, second, *, floor=1e-3):
    """Value and gradients to 1e-10 of the largest of each."""
    torch.manual_seed(1)
    value, drawn = drawn_by(world, loss)
    model = world.reference(world.theta, world.phi, world.given[0], drawn)
    own = {**world.theta, **world.phi}
    gradients = torch.autograd.grad(value, list(own.values()), materialize_grads=True)
    expected, *sides = reference.loss_and_gradients(second, model)
    assert abs(value.detach() - expected) < 1e-10 * abs(expected).clamp(min=1)
    for side in sides:
        assert not side or max(gradient.abs().max() for gradient in side.values()) > floor, "power"
    for (name, gradient), found in zip({**sides[0], **sides[1]}.items(), gradients, strict=True):
        assert (found - gradient).abs().max() < 1e-10 * gradient.abs().max().clamp(min=1), name


DIFFERENTIATED_AS_THEY_ARE = ["ELBO", "IWAE", "Renyi", "MIWAE", "CIWAE"]


@pytest.mark.parametrize("how", [{"size": 13}, {"mask": True, "context": True, "size": 13}], ids=str)
@pytest.mark.parametrize("estimator", DIFFERENTIATED_AS_THEY_ARE)
def test_a_prior_of_the_guides_own_answers_has_a_gradient_by_phi_too(estimator, how):
    assert_same(of_vae("of pseudo-inputs", **how), *ESTIMATORS[estimator])


PAIRS = [(world, name) for world in WORLDS for name in ESTIMATORS if world != "two latents" or "KL" not in name]


@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize(("world", "estimator"), PAIRS)
def test_an_estimator_is_its_papers(world, estimator, beta):
    ours, second = ESTIMATORS[estimator]
    if beta != 1:
        ours, second = elbo.Beta(ours, beta), partial(reference.weighted, inside=second, beta=beta)
    assert_same(WORLDS[world](), ours, second)


@pytest.mark.parametrize("estimator", ["ELBO", "IWAE"])
def test_two_inner_plates_may_have_one_dimension(estimator):
    assert_same(of_inner_plates(pixels=True), *ESTIMATORS[estimator])


@pytest.mark.parametrize("estimator", BY_HAND)
@pytest.mark.parametrize("how", [{}, {"size": 13}, {"context": True, "size": 13}], ids=str)
def test_the_notes_formulas_are_written_out_twice(how, estimator):
    world = of_vae("standard", **how)
    ours, second = BY_HAND[estimator]
    if "note" in estimator:
        world.theta.pop("decoder.log_scale")
        world.reference = _with_scale_one(world.reference)
    assert_same(world, ours, second)


def _with_scale_one(describe):
    def described(theta, *given):
        return describe({**theta, "decoder.log_scale": torch.zeros(()).double()}, *given)

    def without(theta, *given):
        model = described(theta, *given)
        return type(model)(**{**vars(model), "theta": theta})

    return without


INSIDE = {
    "ELBO": (elbo.ELBO(3), by_paper("ELBO")),
    "AnalyticKL": (elbo.AnalyticKL(2), by_paper("AnalyticKL")),
    "IWAE": (elbo.IWAE(3), by_paper("IWAE")),
}
ONE_LATENT = [name for name in WORLDS if "latents" not in name and "inner" not in name]
FLOORED = [(world, inside) for world in ONE_LATENT for inside in INSIDE] + [
    ("two latents", "ELBO"),
    ("two latents", "IWAE"),
]


def between(world):
    """A floor below which the KL of one latent lies, and above which that of another does."""
    model = world.reference(world.theta, world.phi, world.given[0], 2 * (double(3, N, LATENTS),))
    means = torch.cat([kl.flatten(0, -2).mean(0) for kl in model.kl(model.theta, model.phi, model.z)])
    return means.sort().values[:2].mean().item()


@pytest.mark.parametrize(("world", "inside"), FLOORED)
@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("nats", [0.0, None, 50.0], ids=["none", "one", "all"])
def test_free_bits_are_their_papers(world, inside, beta, nats):
    """Of no latent, of one and of all; a β around them weighs the floor too."""
    (ours, second), world = INSIDE[inside], WORLDS[world]()
    nats = between(world) if nats is None else nats
    floored = partial(reference.free_bits, inside=second, nats=nats)
    ours = elbo.Beta(elbo.FreeBits(ours, nats), beta)
    assert_same(world, ours, partial(reference.weighted, inside=floored, beta=beta))


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("world", ONE_LATENT)
def test_the_total_correlation_is_its_papers(world, inside):
    ours, second = INSIDE[inside]
    tcvae = elbo.TCVAE(ours, beta=4.0)
    assert_same(WORLDS[world](), tcvae, partial(reference.total_correlation, inside=second, beta=4.0))


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("how", [{}, {"size": 13}, {"mask": True, "context": True, "size": 13}], ids=str)
def test_infovae_is_its_papers(how, inside):
    ours, second = INSIDE[inside]
    world = of_vae("recorded", **how)
    settings = {"alpha": 0.4, "weight": 7.0}

    def infovae(m):
        of_prior = world.prior_draws[-1].reshape(-1, N, LATENTS)[0]
        return reference.info_vae(m, inside=second, of_prior=of_prior, **settings)

    assert_same(world, elbo.InfoVAE(ours, **settings), infovae)


SCHEDULES = {
    "Linear": (elbo.Linear(7, start=0.2, end=1.5), partial(reference.linear, steps=7, start=0.2, end=1.5)),
    "Cyclical": (
        elbo.Cyclical(24, cycles=3, ramp=0.6, start=0.1, end=0.9),
        partial(reference.cyclical, steps=24, cycles=3, ramp=0.6, start=0.1, end=0.9),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_its_papers(name):
    ours, second = SCHEDULES[name]
    for step in range(40):
        assert float(ours.at(torch.tensor(float(step)).double())) == pytest.approx(second(step), abs=1e-12)


def test_a_scheduled_weight_is_that_of_its_step():
    scheduled = elbo.Beta(elbo.ELBO(3), elbo.Linear(4, start=0.0, end=2.0))
    for _ in range(3):
        scheduled.advance()
    assert_same(of_vae(), scheduled, partial(reference.weighted, inside=by_paper("ELBO"), beta=1.5))


OBJECTIVES = {"Beta", "FreeBits", "TCVAE", "InfoVAE"}
COVERED = {name.split(",")[0] for name in (*ESTIMATORS, *BY_HAND, *SCHEDULES)} | OBJECTIVES
