"""The table of constructors that drives the contract tests: a new member is one row here.

Latents are 3, features 6. Networks are small, in double precision once :func:`make` has built them.
"""

from collections.abc import Callable
from functools import partial

import torch
import zuko
from torch import nn

import pyro_vae as pv
from helpers import reference_bounds, reference_densities

LATENTS, FEATURES = 3, 6


class WithContext(nn.Module):
    """A prior at one context, so that it can be called like the others."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, context=None):
        return self.prior(next(self.parameters()).new_ones(2) if context is None else context)


def bound(prior: nn.Module) -> nn.Module:
    """A prior that has been made part of a VAE, whose encoder it then holds on to."""
    torch.manual_seed(7)
    encoder = pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)).double()
    pv.VAE(prior=prior, decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES)), encoder=encoder)
    return prior


def refining(encoder: nn.Module) -> nn.Module:
    """An encoder that has been made part of a VAE, whose decoder and prior it then holds on to."""
    torch.manual_seed(7)
    decoder = pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.7).double()
    pv.VAE(prior=pv.priors.StandardNormal(LATENTS).double(), decoder=decoder, encoder=encoder)
    return encoder


def prior(name: str, row: reference_densities.Row, latents: int = LATENTS) -> nn.Module:
    """The prior of that row of the table, whose class is named before the comma."""
    return getattr(pv.priors, name.split(",")[0])(latents, **row.settings)


PRIORS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(prior, name, row) for name, row in reference_densities.PRIORS.items()},
    "VampPrior": lambda: bound(pv.priors.VampPrior(torch.randn(20, FEATURES), components=4)),
    "ContextNormal": lambda: WithContext(pv.priors.ContextNormal(pv.nn.mlp(2, [8], 2 * LATENTS))),
    "GumbelSoftmax": lambda: pv.priors.GumbelSoftmax(LATENTS, categories=4, temperature=0.8),
    "Flow": lambda: pv.priors.Flow(zuko.flows.MAF(LATENTS, transforms=1, hidden_features=[8])),
}


def estimator(name: str, row: reference_bounds.Row) -> pv.elbo.Estimator:
    """The estimator of that row of the table, whose class is named before the comma."""
    return getattr(pv.elbo, name.split(",")[0])(row.particles, **row.settings)


ESTIMATORS: dict[str, Callable[[], pv.elbo.Estimator]] = {
    name: partial(estimator, name, row) for name, row in reference_bounds.ESTIMATORS.items()
}

OBJECTIVES: dict[str, Callable[[], pv.elbo.Estimator]] = {
    "Beta": lambda: pv.elbo.Beta(pv.elbo.IWAE(3), 0.5),
    "Beta, scheduled": lambda: pv.elbo.Beta(pv.elbo.ELBO(), pv.elbo.Linear(4)),
    "FreeBits": lambda: pv.elbo.FreeBits(pv.elbo.AnalyticKL(2), nats=0.3),
    "TCVAE": lambda: pv.elbo.TCVAE(pv.elbo.ELBO(), beta=3.0),
    "InfoVAE": lambda: pv.elbo.InfoVAE(pv.elbo.ELBO(), alpha=0.5, weight=5.0),
}

LIKELIHOODS: dict[str, Callable[[], nn.Module]] = {
    "Normal": lambda: pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.7),
    "Normal, learned scale": lambda: pv.likelihoods.Normal(
        pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.7, learn_scale=True
    ),
    "Normal, a scale per feature": lambda: pv.likelihoods.Normal(
        pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.7, per_feature=FEATURES
    ),
    "HeteroscedasticNormal": lambda: pv.likelihoods.HeteroscedasticNormal(
        pv.nn.mlp(LATENTS, [8], 2 * FEATURES), min_scale=0.1
    ),
    "StudentT": lambda: pv.likelihoods.StudentT(pv.nn.mlp(LATENTS, [8], FEATURES), df=12.0, learn_scale=True),
    "Laplace": lambda: pv.likelihoods.Laplace(pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.7, per_feature=FEATURES),
    "Bernoulli": lambda: pv.likelihoods.Bernoulli(pv.nn.mlp(LATENTS, [8], FEATURES)),
    "ContinuousBernoulli": lambda: pv.likelihoods.ContinuousBernoulli(pv.nn.mlp(LATENTS, [8], FEATURES)),
    "Categorical": lambda: pv.likelihoods.Categorical(pv.nn.mlp(LATENTS, [8], 4 * FEATURES), levels=4),
    "DiscretizedLogisticMixture": lambda: pv.likelihoods.DiscretizedLogisticMixture(
        pv.nn.mlp(LATENTS, [8], 9 * FEATURES), components=3, levels=32
    ),
    "Binomial": lambda: pv.likelihoods.Binomial(pv.nn.mlp(LATENTS, [8], FEATURES), total_count=5),
    "Poisson": lambda: pv.likelihoods.Poisson(pv.nn.mlp(LATENTS, [8], FEATURES)),
    "NegativeBinomial": lambda: pv.likelihoods.NegativeBinomial(pv.nn.mlp(LATENTS, [8], 2 * FEATURES)),
    "ZeroInflated": lambda: pv.likelihoods.ZeroInflated(
        pv.nn.mlp(LATENTS, [8], 3 * FEATURES), pv.likelihoods.NegativeBinomial
    ),
    "Hurdle": lambda: pv.likelihoods.Hurdle(pv.nn.mlp(LATENTS, [8], 2 * FEATURES), pv.likelihoods.Poisson),
    "Blocks": lambda: pv.likelihoods.Blocks(
        pv.nn.mlp(LATENTS, [8], 14),
        [
            (partial(pv.likelihoods.Normal, learn_scale=True), 2),
            (pv.likelihoods.Bernoulli, 1),
            (partial(pv.likelihoods.Categorical, levels=4), 2),
            (partial(pv.likelihoods.DiscretizedLogisticMixture, components=1, levels=8), 1),
        ],
    ),
}

# Likelihoods whose support is countable; others are densities, save that Blocks are both.
DISCRETE = {"Bernoulli", "Categorical", "DiscretizedLogisticMixture"}
DISCRETE |= {"Binomial", "Poisson", "NegativeBinomial", "ZeroInflated", "Hurdle"}

POSTERIORS: dict[str, Callable[[], nn.Module]] = {
    "DiagNormal": lambda: pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)),
    "FullNormal": lambda: pv.posteriors.FullNormal(pv.nn.mlp(FEATURES, [8], pv.posteriors.FullNormal.outputs(LATENTS))),
    "LowRankNormal": lambda: pv.posteriors.LowRankNormal(
        pv.nn.mlp(FEATURES, [8], pv.posteriors.LowRankNormal.outputs(LATENTS, rank=2)), 2
    ),
    "GumbelSoftmax": lambda: pv.posteriors.GumbelSoftmax(pv.nn.mlp(FEATURES, [8], 6), 2, temperature=0.8),
    "Flow": lambda: pv.posteriors.Flow(
        zuko.flows.MAF(LATENTS, context=4, transforms=1, hidden_features=[8]), net=pv.nn.mlp(FEATURES, [8], 4)
    ),
    "Refined": lambda: refining(pv.posteriors.Refined(pv.nn.mlp(FEATURES, [8], 2 * LATENTS), steps=3)),
}

# What is exported beside members: the bases, which a member extends.
BASES = {"Prior", "Likelihood", "Posterior"}


def make(constructor: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return constructor().double()


def exported(module) -> set[str]:
    """The members that a module of parts exports: its own public classes."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    here = {name for name, value in own.items() if f"{value.__module__}.".startswith(f"{module.__name__}.")}
    return {name for name in here if not name.startswith("_")}
