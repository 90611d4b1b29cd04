"""Likelihoods, ``z → p(x|z)``."""

from pyro_vae.likelihoods.base import Likelihood, taking
from pyro_vae.likelihoods.blocks import Blocks
from pyro_vae.likelihoods.counts import Binomial, NegativeBinomial, Poisson
from pyro_vae.likelihoods.levels import Bernoulli, Categorical, ContinuousBernoulli, DiscretizedLogisticMixture
from pyro_vae.likelihoods.real import HeteroscedasticNormal, Laplace, Normal, StudentT
from pyro_vae.likelihoods.zeros import Hurdle, ZeroInflated

__all__ = [
    "Bernoulli",
    "Binomial",
    "Blocks",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogisticMixture",
    "HeteroscedasticNormal",
    "Hurdle",
    "Laplace",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
    "ZeroInflated",
    "taking",
]
