"""What the tests of the engine need: the same training by Pyro's SVI and compiled, and how far they are apart."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO

import pyro_vae as pv
from helpers.members import ESTIMATORS, FEATURES, LATENTS, LIKELIHOODS, OBJECTIVES, POSTERIORS, PRIORS
from pyro_vae.train.compiled.optimizers import WholeOptimizer

# pytest listens to every logger, and torch's own trace of a trace takes longer than the trace.
logging.getLogger("torch.__trace").propagate = False

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How far parameters may be apart, relative to their size."""

ROWS, BATCH = 40, 16


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def estimators():
    """Every estimator of the library and Pyro's two; a note's objective is a function."""
    pyros = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": pv.elbo.TraceMeanField_ELBO}
    own = {"HandDerivedELBO": pv.elbo.HandDerivedELBO, "note_objective": lambda: pv.elbo.note_objective}
    return {**pyros, **own, **ESTIMATORS, **OBJECTIVES}


def vae_of(prior="StandardNormal", likelihood="Normal", posterior="DiagNormal", dtype=torch.float64):
    torch.manual_seed(0)
    parts = PRIORS[prior](), LIKELIHOODS[likelihood](), POSTERIORS[posterior]()
    return pv.VAE(prior=parts[0], decoder=parts[1], encoder=parts[2]).to(dtype)


def data_of(likelihood="Normal", dtype=torch.float64):
    torch.manual_seed(5)
    return LIKELIHOODS[likelihood]().double()(torch.randn(ROWS, LATENTS).double()).sample().to(dtype)


def batch_of(x, step):
    """Now and then a smaller one."""
    return x[BATCH : 2 * BATCH - 4] if step % 10 == 9 else x.roll(step, 0)[:BATCH]


def trained(make, svi_of, give, steps=24, between=None, evaluate=False):
    """Losses and parameters after some steps of ``make() -> (model, guide)``."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = make()
    svi, losses = svi_of(model, guide), []
    torch.manual_seed(1)
    for step in range(steps):
        losses.append(svi.step(*give(step)))
        if between is not None:
            between(svi, step)
        if evaluate and step % 20 == 10:
            losses.append(svi.evaluate_loss(*give(step)))
    parameters = {name: value.detach() for name, value in pyro.get_param_store().named_parameters()}
    return torch.tensor(losses, dtype=torch.float64), {n: p.clone() for n, p in parameters.items()}, svi


def apart(first, second):
    """How far two sets of parameters are apart, relative to each tensor's size."""
    pairs = zip(first.values(), second.values(), strict=True)
    return max(((a - b).norm() / a.norm().clamp(min=1e-2)).item() for a, b in pairs)


def both(make, give, optim=adam, loss=Trace_ELBO, backend="eager", clip_norm=None, **kwargs):
    """The same training by Pyro's SVI and compiled."""

    def eager(model, guide):
        made = optim() if getattr(optim, "pyros", False) else WholeOptimizer(optim, clip_norm)
        return SVI(model, guide, made, loss())

    def compiled(model, guide):
        made = optim() if getattr(optim, "pyros", False) else optim
        return pv.CompiledSVI(model, guide, made, loss(), backend=backend, clip_norm=clip_norm)

    return trained(make, eager, give, **kwargs), trained(make, compiled, give, **kwargs)


def assert_same(pair, bound=1e-10):
    (losses, parameters, _), (own_losses, own, svi) = pair
    assert svi._replays._made, "it was compiled"
    assert losses.tolist() == pytest.approx(own_losses.tolist(), rel=bound, abs=bound * losses.abs().max().item())
    assert apart(parameters, own) < bound


def parts_of(vae):
    return vae.model, vae.guide


def pair_of(vae, x, **kwargs):
    return both(lambda: parts_of(vae()), lambda step: (x.roll(step, 0)[:BATCH], ROWS), **kwargs)


X = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def two_latents():
    """A user's own model: a global and a local latent, parameters with constraints, nothing of this library."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(FEATURES), 1.0).to_event(1))
        scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            own = pyro.sample("own", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(own, scale).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", x.new_zeros(FEATURES))
        spread = pyro.param("spread", x.new_ones(FEATURES), constraint=constraints.positive)
        slope = pyro.param("slope", x.new_zeros(FEATURES))
        pyro.sample("mean", dist.Normal(loc, spread).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("own", dist.Normal(slope * x, 0.5).to_event(1))

    return model, guide


def pyros(make):
    make.pyros = True
    return make
