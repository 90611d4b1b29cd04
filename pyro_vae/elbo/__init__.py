"""Log-weights and estimators of the evidence lower bound (ELBO)."""

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.elbo import aggregate, bounds, importance_weighted, objectives, schedules, score_function
from pyro_vae.elbo.aggregate import *  # noqa: F403
from pyro_vae.elbo.bounds import *  # noqa: F403
from pyro_vae.elbo.classes import M2
from pyro_vae.elbo.estimator import Estimator
from pyro_vae.elbo.hand_derived import HandDerivedELBO, note_objective
from pyro_vae.elbo.importance_weighted import *  # noqa: F403
from pyro_vae.elbo.kl import kl_provenance
from pyro_vae.elbo.log_weights import log_weights
from pyro_vae.elbo.objectives import *  # noqa: F403
from pyro_vae.elbo.schedules import *  # noqa: F403
from pyro_vae.elbo.score_function import *  # noqa: F403
from pyro_vae.elbo.weights import Weights

__all__ = [
    *aggregate.__all__,
    *bounds.__all__,
    *importance_weighted.__all__,
    *objectives.__all__,
    *schedules.__all__,
    *score_function.__all__,
    "M2",
    "Estimator",
    "HandDerivedELBO",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
    "Weights",
    "kl_provenance",
    "log_weights",
    "note_objective",
]
