"""Log-weights, and the estimators of the evidence lower bound made of them."""

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.elbo.bounds import CIWAE, ELBO, IWAE, IWAESTL, MIWAE, PIWAE, STL, AnalyticKL, DReG, Estimator, Renyi
from pyro_vae.elbo.hand_derived import HandDerivedELBO, note_objective
from pyro_vae.elbo.kl import kl_provenance
from pyro_vae.elbo.log_weights import Weights, log_weights
from pyro_vae.elbo.objectives import TCVAE, Beta, Cyclical, FreeBits, InfoVAE, Linear, Schedule
from pyro_vae.elbo.score_function import VIMCO, ScoreFunction, Thermodynamic

__all__ = [
    "CIWAE",
    "ELBO",
    "IWAE",
    "IWAESTL",
    "MIWAE",
    "PIWAE",
    "STL",
    "TCVAE",
    "VIMCO",
    "AnalyticKL",
    "Beta",
    "Cyclical",
    "DReG",
    "Estimator",
    "FreeBits",
    "HandDerivedELBO",
    "InfoVAE",
    "Linear",
    "Renyi",
    "Schedule",
    "ScoreFunction",
    "Thermodynamic",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
    "Weights",
    "kl_provenance",
    "log_weights",
    "note_objective",
]
