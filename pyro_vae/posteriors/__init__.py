"""Posteriors, ``x → q(z|x)``."""

from pyro_vae.posteriors.base import Posterior
from pyro_vae.posteriors.categories import GumbelSoftmax
from pyro_vae.posteriors.flow import Flow
from pyro_vae.posteriors.normal import DiagNormal, FullNormal, LowRankNormal
from pyro_vae.posteriors.refined import Refined

__all__ = ["DiagNormal", "Flow", "FullNormal", "GumbelSoftmax", "LowRankNormal", "Posterior", "Refined"]
